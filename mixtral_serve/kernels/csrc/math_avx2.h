// math.h on eight floats. Include it after <immintrin.h> in a translation unit compiled for AVX2 and FMA.
#pragma once

#include "math.h"

namespace mixtral {

static inline __m256 exp_f32x8(__m256 x) {
  const __m256 round = _mm256_set1_ps(kExpRound);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(kExpLog2e), round);
  const __m256 n = _mm256_sub_ps(shifted, round);
  __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-kExpLn2High), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(-kExpLn2Low), r);
  __m256 q = _mm256_fmadd_ps(_mm256_set1_ps(kExpC6), r, _mm256_set1_ps(kExpC5));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExpC4));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExpC3));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(kExpC2));
  const __m256 fraction = _mm256_add_ps(_mm256_fmadd_ps(q, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(shifted),
                                        _mm256_set1_epi32(static_cast<int>(127u - kExpRoundBits)));
  __m256 value = _mm256_mul_ps(fraction, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
  const __m256 low = _mm256_cmp_ps(x, _mm256_set1_ps(kExpLow), _CMP_LT_OQ);
  const __m256 high = _mm256_cmp_ps(x, _mm256_set1_ps(kExpHigh), _CMP_GT_OQ);
  value = _mm256_andnot_ps(low, value);
  return _mm256_blendv_ps(value, _mm256_set1_ps(std::numeric_limits<float>::infinity()), high);
}

static inline __m256 silu_f32x8(__m256 x) {
  const __m256 negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_f32x8(negated)));
}

}  // namespace mixtral
