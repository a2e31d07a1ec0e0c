// The entry points of norms, router and rotary table.
#include "rowwise.h"

#include <cmath>

#include "cpu.h"
#include "parallel.h"

namespace mixtral {
namespace {

constexpr int64_t kRun = 4;                // rows taken at a time
constexpr int64_t kThreadWork = 64 << 10;  // multiply-adds that are worth waking a thread

const RowwiseKernel& kernel() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx2) return kRowwiseAvx2;
#endif
  return kRowwisePortable;
}

int useful_threads(int64_t work, int64_t num_threads) {
  const int64_t threads = 1 + work / kThreadWork;
  return static_cast<int>(threads < num_threads ? threads : num_threads);
}

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) void mixtral_rms_norm(const float* x, const float* weight, float* out,
                                                             int64_t num_rows, int64_t width, float epsilon,
                                                             int64_t num_threads) {
  using namespace mixtral;
  const RmsNormCall call = {x, weight, out, num_rows, width, epsilon};
  const RowwiseKernel& chosen = kernel();
  parallel(useful_threads(num_rows * width, num_threads), [&](Team& team) {
    team.for_each(0, num_rows, kRun, [&](int64_t first, int64_t end) { chosen.rms_norm(call, first, end); });
  });
}

__attribute__((visibility("default"))) int64_t mixtral_max_experts() { return mixtral::kMaxExperts; }

__attribute__((visibility("default"))) void mixtral_route(const float* hidden, const float* gate, float* logits,
                                                          float* weights, int64_t* experts, int64_t num_rows,
                                                          int64_t width, int64_t num_experts, int64_t k,
                                                          int64_t num_threads) {
  using namespace mixtral;
  const RouteCall call = {hidden, gate, logits, weights, experts, num_rows, width, num_experts, k};
  const RowwiseKernel& chosen = kernel();
  parallel(useful_threads(num_rows * width * num_experts, num_threads), [&](Team& team) {
    team.for_each(0, num_rows, kRun, [&](int64_t first, int64_t end) { chosen.route(call, first, end); });
  });
}

// cosine and sine [positions, half] of position * frequency. The angle is rounded to single precision, as Transformers
// does; its cosine is computed in double, one number at a time, so that it depends on nothing else.
__attribute__((visibility("default"))) void mixtral_rotary_table(const float* frequencies, float* cosine, float* sine,
                                                                 int64_t num_positions, int64_t half) {
  for (int64_t position = 0; position < num_positions; ++position) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * frequencies[i];
      cosine[position * half + i] = static_cast<float>(std::cos(angle));
      sine[position * half + i] = static_cast<float>(std::sin(angle));
    }
  }
}
}
