#include "cpu.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mixtral {
namespace {

std::atomic<int> g_trusted{static_cast<int>(Isa::amx)};
std::atomic<int> g_asked{-1};

constexpr Isa lesser(Isa a, Isa b) { return a < b ? a : b; }

#if defined(__x86_64__)
// Asked of the CPU itself, since not every compiler's own question knows it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29) != 0;
}
#endif

#if defined(__x86_64__) && defined(__linux__)
// Whether this process may use AMX for bytes: the CPU has it, the kernel saves its registers, and grants them when
// asked (they are large, so Linux gives them to those processes only that ask).
bool has_amx_int8() {
  constexpr unsigned kTilesAndBytes = 3u << 24, kOsSavesMore = 1u << 27;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTilesAndBytes) != kTilesAndBytes) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsSavesMore) == 0) return false;
  constexpr uint32_t kTileState = 3u << 17;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool has_amx_int8() { return false; }
#endif

// The best one this CPU has and its operating system lets this process use.
Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return has_amx_int8() ? Isa::amx : Isa::avx512vnni;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa best_isa() {
  static const Isa detected = detected_isa();
  return lesser(detected, static_cast<Isa>(g_trusted.load(std::memory_order_relaxed)));
}

Isa active_isa() {
  const Isa best = best_isa();
  const int asked = g_asked.load(std::memory_order_relaxed);
  return asked >= 0 ? lesser(best, static_cast<Isa>(asked)) : best;
}

}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int mixtral_best_isa() { return static_cast<int>(mixtral::best_isa()); }

__attribute__((visibility("default"))) int mixtral_active_isa() { return static_cast<int>(mixtral::active_isa()); }

// Nothing above instruction set `isa` is used from now on, whatever is asked for: it was found to compute otherwise.
__attribute__((visibility("default"))) void mixtral_trust_isa(int isa) { mixtral::g_trusted.store(isa); }

// Uses at most instruction set `isa` from now on, the best one if it is -1; returns what was asked for before.
__attribute__((visibility("default"))) int mixtral_limit_isa(int isa) { return mixtral::g_asked.exchange(isa); }
}
