#include "cpu.h"

#include <atomic>

namespace mixtral {
namespace {

std::atomic<int> g_asked{-1};

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return Isa::avx512vnni;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa active_isa() {
  static const int best = static_cast<int>(best_isa());
  const int asked = g_asked.load(std::memory_order_relaxed);
  return static_cast<Isa>(asked >= 0 && asked < best ? asked : best);
}

}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int mixtral_best_isa() { return static_cast<int>(mixtral::best_isa()); }

// Uses at most instruction set `isa` from now on; -1 goes back to the best one. For tests and measurements.
__attribute__((visibility("default"))) void mixtral_limit_isa(int isa) { mixtral::g_asked.store(isa); }
}
