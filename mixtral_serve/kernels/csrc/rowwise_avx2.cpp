// The row-wise kernels for AVX2 and FMA: sixteen floats are two registers.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)

#include "avx2_target.h"

#include "math_avx2.h"

namespace mixtral {
namespace {

struct Lanes {
  __m256 low, high;
};

// How many rows, and lanes for so many rows, the products of attention hold in sixteen registers.
constexpr int kMaxRows = 6;
constexpr int registers_wide(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes plus(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes minus(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes times(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes over(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes exponential(Lanes x) {
  __m256 both[] = {x.low, x.high};
  exp_f32x8(both);
  return {both[0], both[1]};
}
inline void exponential_of_nonpositive(Lanes (&x)[2]) {
  __m256 all[] = {x[0].low, x[0].high, x[1].low, x[1].high};
  exp_f32x8<4, false>(all);
  x[0] = {all[0], all[1]};
  x[1] = {all[2], all[3]};
}

inline __m256 within8(__m256 x, __m256 other, int64_t from, int64_t to) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i begun = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(static_cast<int>(from - 1)));
  const __m256i open = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(to)), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_and_si256(begun, open)));
}

// Lanes from <= i < to of x, the others of `other`.
inline Lanes within(Lanes x, Lanes other, int64_t from, int64_t to) {
  return {within8(x.low, other.low, from, to), within8(x.high, other.high, from - 8, to - 8)};
}

inline __m256 widen(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Lanes load_bf16(const uint16_t* from) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
}
inline Lanes load_int8(const int8_t* from) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from + 8)))};
}

inline float first_of(Lanes x) { return _mm256_cvtss_f32(x.low); }

inline float sum_of(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline float largest_of(Lanes x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

}  // namespace
}  // namespace mixtral

#include "attention_kernel.h"
#include "rowwise_kernel.h"
#include "vocabulary_kernel.h"

namespace mixtral {

const AttentionKernel kAttentionAvx2 = {attend, merge};
const RowwiseKernel kRowwiseAvx2 = {rms_norm, route};
const VocabularyKernel kVocabularyAvx2 = {chunk_maxima, finite_maxima, chunk_shares, finite_rows, exponentials};

}  // namespace mixtral

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
