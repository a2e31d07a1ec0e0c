// Quantising a row with AVX2: pieces of four columns, of bytes (int4) or of words (int8).
//
// Included inside a translation unit's own target pragma, hence everything in an anonymous namespace.
#pragma once

#include <cstdint>
#include <limits>

#include "products.h"

namespace mixtral {
namespace {

constexpr int kLanes = 8;
constexpr int kInt8ColumnBytes = 2;

inline int32_t sum_of(__m256i x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// The first `count` of eight floats, zeros behind.
inline __m256 load_part(const float* x, int64_t count) {
  if (count >= kLanes) return _mm256_loadu_ps(x);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < 0 ? 0 : count)), lane);
  return _mm256_maskload_ps(x, valid);
}

uint32_t largest_magnitude(const float* x, int64_t num_cols) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < num_cols; i += kLanes) {
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(load_part(x + i, num_cols - i)), mask));
  }
  alignas(32) uint32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t result = 0;
  for (const uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

// Writes eight quantised columns as two pieces, of bytes (int4) or of words, and returns them as integers.
inline __m256i quantize_8(Kind kind, const float* x, int64_t count, __m256 inverse, int8_t* out, int64_t distance) {
  const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(load_part(x, count), inverse));
  const __m256i words = _mm256_packs_epi32(q, q);
  if (kind == Kind::int8) {
    _mm_storeu_si64(out, _mm256_castsi256_si128(words));
    _mm_storeu_si64(out + distance, _mm256_extracti128_si256(words, 1));
    return q;
  }
  const __m256i bytes = _mm256_packs_epi16(words, words);
  _mm_storeu_si32(out, _mm256_castsi256_si128(bytes));
  _mm_storeu_si32(out + distance, _mm256_extracti128_si256(bytes, 1));
  return q;
}

// What the two words of a group's sums start at: columns 0 and 1 of every four go into the low one, 2 and 3 into the
// high one. `sum` holds the sums of columns 0..7, modulo 8.
inline int32_t int4_offsets(__m256i sum) {
  const __m128i fours = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i pairs = _mm_hadd_epi32(fours, fours);
  const int32_t low = -8 * _mm_cvtsi128_si32(pairs), high = -8 * _mm_extract_epi32(pairs, 1);
  return static_cast<int32_t>(static_cast<uint32_t>(low & 0xffff) | (static_cast<uint32_t>(high) << 16));
}

void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const uint32_t largest = largest_magnitude(x, num_cols);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest))));
  const bool finite = largest < 0x7f800000u;
  const float inverse = 127.0f / absmax;
  const bool usable = finite && inverse <= std::numeric_limits<float>::max();
  *place.scale = usable ? absmax / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const __m256 inverses = _mm256_set1_ps(usable ? inverse : 0.0f);
  const int64_t distance = 4 * place.num_block_rows * (kind == Kind::int8 ? kInt8ColumnBytes : 1);
  int8_t* first_piece = place.quants + distance / place.num_block_rows * place.row;
  __m256i row_sum = _mm256_setzero_si256();
  for (int64_t g = 0; g < num_groups; ++g) {
    // A row that cannot be used is read as if it had no columns: zeros.
    const int64_t first = g * kGroupCols, count = usable ? num_cols - first : 0;
    __m256i sum = _mm256_setzero_si256();
    MIXTRAL_UNROLL
    for (int i = 0; i < kGroupCols / kLanes; ++i) {
      int8_t* out = first_piece + (g * 8 + 2 * i) * distance;
      const float* from = x + first + i * kLanes;
      sum = _mm256_add_epi32(sum, quantize_8(kind, from, count - i * kLanes, inverses, out, distance));
    }
    if (kind == Kind::int4) place.offsets[g * place.num_block_rows + place.row] = int4_offsets(sum);
    row_sum = _mm256_add_epi32(row_sum, sum);
  }
  if (kind == Kind::int8) place.offsets[place.row] = -128 * sum_of(row_sum);
}

}  // namespace
}  // namespace mixtral
