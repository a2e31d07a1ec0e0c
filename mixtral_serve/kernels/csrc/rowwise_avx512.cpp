// The row-wise kernels for AVX-512: sixteen floats are one register.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)

// Some compilers take the undefined operand inside their own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>

#include "math_avx512.h"

namespace mixtral {
namespace {

struct Lanes {
  __m512 all;
};

// How many rows, and lanes for so many rows, the products of attention hold in thirty-two registers.
constexpr int kMaxRows = 8;
constexpr int registers_wide(int rows) { return rows <= 4 ? 4 : 2; }

inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x.all); }
inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes plus(Lanes a, Lanes b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Lanes minus(Lanes a, Lanes b) { return {_mm512_sub_ps(a.all, b.all)}; }
inline Lanes times(Lanes a, Lanes b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline Lanes over(Lanes a, Lanes b) { return {_mm512_div_ps(a.all, b.all)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.all, b.all)}; }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
inline Lanes exponential(Lanes x) { return {exp_f32x16(x.all)}; }
inline void exponential_of_nonpositive(Lanes (&x)[2]) {
  for (Lanes& lanes : x) lanes = exponential(lanes);
}

// Bits 0..count-1, for any count.
inline uint32_t first_bits(int64_t count) { return count <= 0 ? 0u : count >= 16 ? 0xffffu : (1u << count) - 1u; }

// Lanes from <= i < to of x, the others of `other`.
inline Lanes within(Lanes x, Lanes other, int64_t from, int64_t to) {
  const __mmask16 mask = static_cast<__mmask16>(first_bits(to) & ~first_bits(from));
  return {_mm512_mask_mov_ps(other.all, mask, x.all)};
}

inline Lanes load_bf16(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Lanes load_int8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

inline float first_of(Lanes x) { return _mm512_cvtss_f32(x.all); }
inline __m256 upper(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }

inline float sum_of(Lanes x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.all), upper(x.all));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline float largest_of(Lanes x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.all), upper(x.all));
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

const AttentionKernel kAttentionAvx512 = {attend, merge};
const RowwiseKernel kRowwiseAvx512 = {rms_norm, route};
const VocabularyKernel kVocabularyAvx512 = {chunk_maxima, finite_maxima, chunk_shares, finite_rows, exponentials};

}  // namespace mixtral

#endif
