// The small product of attention, rows x lanes, on values in the form they are held in.
//
// Included by attention_kernel.h, and so compiled once for each instruction set. Each element of a result is one chain
// of fused multiply-adds over the depth, ascending, however many rows and lanes are computed at once.
#pragma once

#include "attention.h"

namespace mixtral {
namespace {

inline Lanes load_as(const float* from) { return load(from); }
inline Lanes load_as(const uint16_t* from) { return load_bf16(from); }
inline Lanes load_as(const int8_t* from) { return load_int8(from); }

inline float one_as(float from) { return from; }
inline float one_as(int8_t from) { return static_cast<float>(from); }
inline float one_as(uint16_t from) {
  const uint32_t bits = static_cast<uint32_t>(from) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// What comes after a product, for which it asks memory a little with each step. All at once would be more than memory
// can be asked for, and then the products would wait.
template <typename Element>
struct Upcoming {
  const Element* first;
  int64_t stride;  // of one step of the depth
  int64_t step;    // of sixteen lanes

  void ask(int64_t depth, int width) const { __builtin_prefetch(first + depth * stride + width * step, 0, 2); }
  Upcoming behind(int width) const { return {first + width * step, stride, step}; }
};

struct NothingUpcoming {
  void ask(int64_t, int) const {}
  NothingUpcoming behind(int) const { return {}; }
};

// c[rows][lanes] (+)= a[rows][depth] * b[depth][lanes], each element one chain over the depth, ascending. Sixteen lanes
// of b lie side by side, the next sixteen `b_step` further.
template <int kRows, int kWidth, typename Element, typename Next>
inline void product(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, int64_t b_step, int64_t depth,
                    float* c, int64_t c_stride, bool from_zero, const Next& upcoming) {
  Lanes sums[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) sums[r][w] = from_zero ? broadcast(0.0f) : load(c + r * c_stride + w * kLanes);
  }
  for (int64_t i = 0; i < depth; ++i) {
    Lanes column[kWidth];
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) {
      upcoming.ask(i, w);
      column[w] = load_as(b + i * b_stride + w * b_step);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Lanes factor = broadcast(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) sums[r][w] = fused(factor, column[w], sums[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) store(c + r * c_stride + w * kLanes, sums[r][w]);
  }
}

// The same for any width (a multiple of kLanes), as many lanes at a time as the registers hold.
template <int kRows, int kWidth, typename Element, typename Next>
inline void wide_product(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, int64_t b_step,
                         int64_t depth, float* c, int64_t c_stride, int64_t width, bool from_zero, Next upcoming) {
  for (; width >= kWidth * kLanes; width -= kWidth * kLanes) {
    product<kRows, kWidth>(a, a_stride, b, b_stride, b_step, depth, c, c_stride, from_zero, upcoming);
    upcoming = upcoming.behind(kWidth);
    b += kWidth * b_step;
    c += kWidth * kLanes;
  }
  if constexpr (kWidth > 1) {
    wide_product<kRows, kWidth / 2>(a, a_stride, b, b_stride, b_step, depth, c, c_stride, width, from_zero, upcoming);
  }
}

template <int kRows = kMaxRows, typename Element, typename Next = NothingUpcoming>
inline void product_of(int64_t rows, const float* a, int64_t a_stride, const Element* b, int64_t b_stride,
                       int64_t b_step, int64_t depth, float* c, int64_t c_stride, int64_t width, bool from_zero,
                       const Next& upcoming = {}) {
  if (rows == kRows) {
    wide_product<kRows, registers_wide(kRows)>(a, a_stride, b, b_stride, b_step, depth, c, c_stride, width, from_zero,
                                               upcoming);
  } else if constexpr (kRows > 1) {
    product_of<kRows - 1>(rows, a, a_stride, b, b_stride, b_step, depth, c, c_stride, width, from_zero, upcoming);
  }
}

}  // namespace
}  // namespace mixtral
