#include "parallel.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mixtral {
namespace {

Runtime g_runtime = {nullptr, nullptr, nullptr};

// About 20 microseconds: longer than the threads of one phase usually lie apart, shorter than a futex round trip hurts.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

struct Region {
  void (*body)(void*, Team&);
  void* data;
  Team team;
};

void enter(void* data) {
  auto* region = static_cast<Region*>(data);
  region->body(region->data, region->team);
}

}  // namespace

void set_runtime(const Runtime& runtime) { g_runtime = runtime; }

void Barrier::wait(int num_threads) {
  if (num_threads == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_threads)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) futex(&phase_, FUTEX_WAKE_PRIVATE, INT32_MAX);
    return;
  }
  for (int spin = 0; spin < kSpins; ++spin) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    relax();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (phase_.load(std::memory_order_seq_cst) == phase) futex(&phase_, FUTEX_WAIT_PRIVATE, phase);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

// A runtime may give fewer threads than were asked for: the team is as large as it says it is.
int Team::size() const { return g_runtime.num_threads ? g_runtime.num_threads() : 1; }
int Team::rank() const { return g_runtime.thread_num ? g_runtime.thread_num() : 0; }
void Team::barrier() { barrier_.wait(size()); }

void run_region(int num_threads, void (*body)(void*, Team&), void* data) {
  Region region{body, data, {}};
  if (g_runtime.parallel && num_threads > 1) {
    g_runtime.parallel(enter, &region, static_cast<unsigned>(num_threads), 0);
  } else {
    enter(&region);
  }
}

}  // namespace mixtral

extern "C" __attribute__((visibility("default"))) void mixtral_set_runtime(void* parallel, void* num_threads,
                                                                           void* thread_num) {
  mixtral::Runtime runtime;
  runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
  runtime.num_threads = reinterpret_cast<decltype(runtime.num_threads)>(num_threads);
  runtime.thread_num = reinterpret_cast<decltype(runtime.thread_num)>(thread_num);
  mixtral::set_runtime(runtime);
}
