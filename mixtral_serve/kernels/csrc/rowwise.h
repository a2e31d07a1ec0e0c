// What is computed for each row on its own besides attention and the integer products: norms and the router.
//
// The law: every sum over a row's elements is sixteen sums, of the elements at positions equal modulo 16, each one
// chain of fused multiply-adds in ascending order, which are then added pairwise: i and i + 8, i and i + 4, i and
// i + 2, i and i + 1.
#pragma once

#include <cstdint>

namespace mixtral {

constexpr int kMaxExperts = 256;

struct RmsNormCall {
  const float* x;  // [rows, width]
  const float* weight;
  float* out;  // [rows, width]
  int64_t num_rows, width;
  float epsilon;
};

struct RouteCall {
  const float* hidden;  // [rows, width]
  const float* gate;    // [experts, width]
  float* logits;        // [rows, experts]
  float* weights;       // [rows, k]: descending, their sum is 1
  int64_t* experts;     // [rows, k]
  int64_t num_rows, width, num_experts, k;
};

// Each on rows [first, end).
struct RowwiseKernel {
  void (*rms_norm)(const RmsNormCall& call, int64_t first, int64_t end);
  void (*route)(const RouteCall& call, int64_t first, int64_t end);
};

extern const RowwiseKernel kRowwisePortable;
#if defined(__x86_64__)
extern const RowwiseKernel kRowwiseAvx2;
#endif

}  // namespace mixtral
