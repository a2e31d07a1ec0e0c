// One parallel region per call, on the thread pool PyTorch already has.
//
// The library is linked to no OpenMP runtime of its own: a second one would be a second pool of threads on the same
// cores. Instead Python hands over the entry points of the runtime that PyTorch is linked to (set_runtime), and
// every region runs on those threads. Without a runtime a region runs on the calling thread alone.
//
// Who computes what never decides a result: work is cut into tasks whose results do not depend on the thread, the
// number of threads or the order in which tasks are taken.
#pragma once

#include <atomic>
#include <cstdint>

namespace mixtral {

// The three entry points of the OpenMP runtime (GOMP's interface, which LLVM's and Intel's runtimes offer as well).
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*num_threads)();
  int (*thread_num)();
};

void set_runtime(const Runtime& runtime);

// A barrier for a team of known size: spins briefly, since phases are short, then sleeps, since a spinning thread may
// hold the core of the one it waits for.
class Barrier {
 public:
  void wait(int num_threads);

 private:
  std::atomic<uint32_t> arrived_{0};
  std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// What the threads of one region share: who they are, a barrier, and counters that hand out tasks.
class Team {
 public:
  static constexpr int kMaxPhases = 16;

  int size() const;
  int rank() const;
  void barrier();

  // Tasks 0..num_tasks-1 of phase `phase` (each phase at most once per region), in runs of `run`: calls
  // body(first, end) on whichever thread is free.
  template <typename Body>
  void for_each(int phase, int64_t num_tasks, int64_t run, Body&& body) {
    for (;;) {
      const int64_t first = next_[phase].fetch_add(run, std::memory_order_relaxed);
      if (first >= num_tasks) return;
      body(first, first + run < num_tasks ? first + run : num_tasks);
    }
  }

 private:
  Barrier barrier_;
  alignas(64) std::atomic<int64_t> next_[kMaxPhases] = {};
};

// Runs body(team) on up to `num_threads` threads and returns when all are done.
void run_region(int num_threads, void (*body)(void*, Team&), void* data);

template <typename Body>
void parallel(int num_threads, Body&& body) {
  run_region(num_threads, [](void* data, Team& team) { (*static_cast<Body*>(data))(team); }, &body);
}

}  // namespace mixtral
