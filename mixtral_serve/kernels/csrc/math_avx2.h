// math.h on eight floats. Include it after <immintrin.h> in a translation unit compiled for AVX2 and FMA.
#pragma once

#include "math.h"

namespace mixtral {

// In place. One exponential is a chain of dependent instructions, and the processor does not look far enough ahead to
// find the next one: several are written side by side, step by step. Where none is positive, none is too high.
template <int kCount, bool kHasPositive = true>
static inline void exp_f32x8(__m256 (&x)[kCount]) {
  const auto each = [](const auto& step) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) step(i);
  };
  const __m256 round = _mm256_set1_ps(kExpRound);
  __m256 shifted[kCount], r[kCount], q[kCount], high[kCount];
  each([&](int i) { shifted[i] = _mm256_fmadd_ps(x[i], _mm256_set1_ps(kExpLog2e), round); });
  each([&](int i) {
    const __m256 n = _mm256_sub_ps(shifted[i], round);
    r[i] = _mm256_fmadd_ps(n, _mm256_set1_ps(-kExpLn2High), x[i]);
    r[i] = _mm256_fmadd_ps(n, _mm256_set1_ps(-kExpLn2Low), r[i]);
    high[i] = kHasPositive ? _mm256_cmp_ps(x[i], _mm256_set1_ps(kExpHigh), _CMP_GT_OQ) : _mm256_setzero_ps();
    x[i] = _mm256_cmp_ps(x[i], _mm256_set1_ps(kExpLow), _CMP_LT_OQ);  // from here on: which are too low
  });
  each([&](int i) { q[i] = _mm256_fmadd_ps(_mm256_set1_ps(kExpC6), r[i], _mm256_set1_ps(kExpC5)); });
  each([&](int i) { q[i] = _mm256_fmadd_ps(q[i], r[i], _mm256_set1_ps(kExpC4)); });
  each([&](int i) { q[i] = _mm256_fmadd_ps(q[i], r[i], _mm256_set1_ps(kExpC3)); });
  each([&](int i) { q[i] = _mm256_fmadd_ps(q[i], r[i], _mm256_set1_ps(kExpC2)); });
  each([&](int i) {
    const __m256 fraction = _mm256_fmadd_ps(q[i], _mm256_mul_ps(r[i], r[i]), r[i]);
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(shifted[i]),
                                          _mm256_set1_epi32(static_cast<int>(127u - kExpRoundBits)));
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
    const __m256 value = _mm256_mul_ps(_mm256_add_ps(fraction, _mm256_set1_ps(1.0f)), power);
    x[i] = _mm256_andnot_ps(x[i], value);
    const __m256 infinite = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    if (kHasPositive) x[i] = _mm256_blendv_ps(x[i], infinite, high[i]);
  });
}

static inline __m256 exp_f32x8(__m256 x) {
  __m256 one[] = {x};
  exp_f32x8(one);
  return one[0];
}

static inline __m256 silu_f32x8(__m256 x) {
  const __m256 negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_f32x8(negated)));
}

}  // namespace mixtral
