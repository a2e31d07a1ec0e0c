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

// The two entry points of the OpenMP runtime (GOMP's interface, which LLVM's and Intel's runtimes offer as well).
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*thread_num)();
};

void set_runtime(const Runtime& runtime);

// Hands out the tasks of one phase and knows when all of them are done.
//
// Between phases, who has nothing left to do waits for work that somebody began and not for a thread: one that is still
// being woken may miss a phase.
class Phase {
 public:
  // Tasks that nobody has taken yet: the first of `run`.
  int64_t take(int64_t run) { return next_.fetch_add(run, std::memory_order_relaxed); }

  // Notes `count` more of `num_tasks` as done.
  void finish(int64_t count, int64_t num_tasks);

  // Returns when all are done. Spins briefly, since tasks are short, then sleeps, since a spinning thread may hold the
  // core of the one it waits for.
  void wait(int64_t num_tasks);

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// What the threads of one region share: their ranks, and the phases of their work.
class Team {
 public:
  static constexpr int kMaxPhases = 5;

  int rank() const;

  // Tasks 0..num_tasks-1 of phase `phase` (each phase at most once per region), in runs of `run`: calls
  // body(first, end) on whichever thread is free. Others may still be at work when it returns.
  template <typename Body>
  void for_each(int phase, int64_t num_tasks, int64_t run, Body&& body) {
    for (;;) {
      const int64_t first = phases_[phase].take(run);
      if (first >= num_tasks) return;
      const int64_t end = first + run < num_tasks ? first + run : num_tasks;
      body(first, end);
      phases_[phase].finish(end - first, num_tasks);
    }
  }

  // Likewise, and returns when all tasks are done.
  template <typename Body>
  void for_all(int phase, int64_t num_tasks, int64_t run, Body&& body) {
    for_each(phase, num_tasks, run, body);
    phases_[phase].wait(num_tasks);
  }

 private:
  Phase phases_[kMaxPhases];
};

// Runs body(team) on up to `num_threads` threads and returns when all are done.
void run_region(int num_threads, void (*body)(void*, Team&), void* data);

template <typename Body>
void parallel(int num_threads, Body&& body) {
  run_region(num_threads, [](void* data, Team& team) { (*static_cast<Body*>(data))(team); }, &body);
}

}  // namespace mixtral
