// Norms and the router, written once for all instruction sets; included like attention_kernel.h. The order of the sums
// stands in rowwise.h.
#pragma once

#include "math.h"
#include "rowwise.h"

namespace mixtral {
namespace {

// Sixteen sums of products, of kPairs pairs of vectors that share `a`.
template <int kPairs>
inline void dot(const float* a, const float* b, int64_t b_stride, int64_t width, float* out) {
  Lanes sums[kPairs];
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p) sums[p] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    const Lanes x = load(a + i);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) sums[p] = fused(x, load(b + p * b_stride + i), sums[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p) {
    alignas(64) float lanes[16];
    store(lanes, sums[p]);
    for (int64_t j = i; j < width; ++j) lanes[j - i] = __builtin_fmaf(a[j], b[p * b_stride + j], lanes[j - i]);
    out[p] = sum_of(load(lanes));
  }
}

void rms_norm(const RmsNormCall& call, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    const float* x = call.x + row * call.width;
    float* out = call.out + row * call.width;
    float squares;
    dot<1>(x, x, 0, call.width, &squares);
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(call.width) + call.epsilon);
    const Lanes factors = broadcast(factor);
    int64_t i = 0;
    for (; i + 16 <= call.width; i += 16) store(out + i, times(load(call.weight + i), times(load(x + i), factors)));
    for (; i < call.width; ++i) out[i] = call.weight[i] * (x[i] * factor);
  }
}

// Softmax over all experts, then the k most probable ones (the lowest ids among equals), their weights scaled to sum 1.
void choose(const float* logits, int64_t num_experts, int64_t k, float* weights, int64_t* experts) {
  float probabilities[kMaxExperts];
  bool is_taken[kMaxExperts] = {};
  float largest = logits[0];
  for (int64_t e = 1; e < num_experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  float sum = 0.0f;
  for (int64_t e = 0; e < num_experts; ++e) {
    probabilities[e] = exp_f32(logits[e] - largest);
    sum += probabilities[e];
  }
  float chosen_sum = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (!is_taken[e] && (best < 0 || probabilities[e] > probabilities[best])) best = e;
    }
    is_taken[best] = true;
    experts[i] = best;
    weights[i] = probabilities[best] / sum;
    chosen_sum += weights[i];
  }
  for (int64_t i = 0; i < k; ++i) weights[i] = weights[i] / chosen_sum;
}

void route(const RouteCall& call, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    const float* hidden = call.hidden + row * call.width;
    float* logits = call.logits + row * call.num_experts;
    int64_t e = 0;
    for (; e + 4 <= call.num_experts; e += 4) {
      dot<4>(hidden, call.gate + e * call.width, call.width, call.width, logits + e);
    }
    for (; e < call.num_experts; ++e) dot<1>(hidden, call.gate + e * call.width, call.width, call.width, logits + e);
    choose(logits, call.num_experts, call.k, call.weights + row * call.k, call.experts + row * call.k);
  }
}

}  // namespace
}  // namespace mixtral
