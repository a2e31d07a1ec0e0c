#include "parallel.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mixtral {
namespace {

Runtime g_runtime = {nullptr, nullptr};

// About 20 microseconds: longer than the last tasks of a phase usually lie apart, shorter than a futex round trip hurts.
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

void Phase::finish(int64_t count, int64_t num_tasks) {
  const uint32_t done = done_.fetch_add(static_cast<uint32_t>(count), std::memory_order_seq_cst);
  if (done + count != num_tasks || sleepers_.load(std::memory_order_seq_cst) == 0) return;
  futex(&done_, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

void Phase::wait(int64_t num_tasks) {
  const uint32_t all = static_cast<uint32_t>(num_tasks);
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done_.load(std::memory_order_acquire) == all) return;
    relax();
  }
  // Whoever finishes the last task either sees a sleeper and wakes it, or finished before it looked once more.
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t done; (done = done_.load(std::memory_order_seq_cst)) != all;) futex(&done_, FUTEX_WAIT_PRIVATE, done);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

int Team::rank() const { return g_runtime.thread_num ? g_runtime.thread_num() : 0; }

void run_region(int num_threads, void (*body)(void*, Team&), void* data) {
  Region region{body, data, {}};
  if (g_runtime.parallel && num_threads > 1) {
    g_runtime.parallel(enter, &region, static_cast<unsigned>(num_threads), 0);
  } else {
    enter(&region);
  }
}

}  // namespace mixtral

extern "C" __attribute__((visibility("default"))) void mixtral_set_runtime(void* parallel, void* thread_num) {
  mixtral::Runtime runtime;
  runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(parallel);
  runtime.thread_num = reinterpret_cast<decltype(runtime.thread_num)>(thread_num);
  mixtral::set_runtime(runtime);
}
