// Quantising a row with AVX-512, for whatever order its bytes are put down in.
//
// Included inside a translation unit's own target pragma, hence everything in an anonymous namespace.
#pragma once

#include <limits>

#include "products.h"

namespace mixtral {
namespace {

inline uint32_t largest_magnitude(const float* x, int64_t num_cols) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < num_cols; i += 16) {
    const __mmask16 valid = num_cols - i < 16 ? static_cast<__mmask16>((1u << (num_cols - i)) - 1) : 0xffff;
    const __m512i bits = _mm512_maskz_loadu_epi32(valid, x + i);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, mask));
  }
  return _mm512_reduce_max_epu32(largest);
}

inline __m512i quantize_16(const float* x, int64_t count, __m512 inverse) {
  const __mmask16 valid = count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x), inverse));
}

// Calls put(first column, 16 columns as bytes) for all columns, ascending, and put_sum(group, its sum); writes the
// scale and returns the sum of all.
template <typename Put, typename PutSum>
inline int32_t quantize_columns(const float* x, int64_t num_cols, int64_t num_groups, float* scale, const Put& put,
                                const PutSum& put_sum) {
  const uint32_t largest = largest_magnitude(x, num_cols);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest))));
  const bool finite = largest < 0x7f800000u;
  const float inverse = 127.0f / absmax;
  const bool usable = finite && inverse <= std::numeric_limits<float>::max();
  *scale = usable ? absmax / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const __m512 inverses = _mm512_set1_ps(usable ? inverse : 0.0f);
  __m512i row_sum = _mm512_setzero_si512();
  for (int64_t g = 0; g < num_groups; ++g) {
    // A row that cannot be used is read as if it had no columns: zeros.
    const int64_t first = g * kGroupCols, count = usable ? num_cols - first : 0;
    const __m512i low = quantize_16(x + first, count, inverses), high = quantize_16(x + first + 16, count - 16, inverses);
    put(first, _mm512_cvtepi32_epi8(low));
    put(first + 16, _mm512_cvtepi32_epi8(high));
    const __m512i sum = _mm512_add_epi32(low, high);
    put_sum(g, sum);
    row_sum = _mm512_add_epi32(row_sum, sum);
  }
  return _mm512_reduce_add_epi32(row_sum);
}

}  // namespace
}  // namespace mixtral
