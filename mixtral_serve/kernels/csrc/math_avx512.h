// math.h on sixteen floats. Include it after <immintrin.h> in a translation unit compiled for AVX-512.
#pragma once

#include "math.h"

namespace mixtral {

static inline __m512 exp_f32x16(__m512 x) {
  const __m512 round = _mm512_set1_ps(kExpRound);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(kExpLog2e), round);
  const __m512 n = _mm512_sub_ps(shifted, round);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-kExpLn2High), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(-kExpLn2Low), r);
  __m512 q = _mm512_fmadd_ps(_mm512_set1_ps(kExpC6), r, _mm512_set1_ps(kExpC5));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExpC4));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExpC3));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(kExpC2));
  const __m512 fraction = _mm512_add_ps(_mm512_fmadd_ps(q, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(shifted),
                                        _mm512_set1_epi32(static_cast<int>(127u - kExpRoundBits)));
  __m512 value = _mm512_mul_ps(fraction, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23)));
  const __mmask16 low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpLow), _CMP_LT_OQ);
  const __mmask16 high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpHigh), _CMP_GT_OQ);
  value = _mm512_maskz_mov_ps(static_cast<__mmask16>(~low), value);
  return _mm512_mask_mov_ps(value, high, _mm512_set1_ps(std::numeric_limits<float>::infinity()));
}

static inline __m512 silu_f32x16(__m512 x) {
  const __m512 negated = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_f32x16(negated)));
}

}  // namespace mixtral
