// What the products of AVX2 share: vectors in and out of memory, and the int8 pieces of narrow and wide blocks.
//
// Included inside a translation unit's own target pragma, hence everything in an anonymous namespace.
#pragma once

#include <cstdint>

#include "products.h"

namespace mixtral {

// Whole passes, with factors (1.9 MB of 4096 columns) that stay in the cache behind the second-level one.
constexpr int kAvx2WideRows = 132;

// products_avx2_wide.cpp: of wide blocks.
void quantize_int8_pair_avx2(const float* upper, const float* lower, int64_t num_cols, int64_t num_groups,
                             const RowPlace& place);
void multiply_int8_wide_avx2(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out,
                             int64_t stride);

namespace {

constexpr int kLanes = 8;
// Rows of int8 lie in memory as words, four columns at a time; in wide blocks 3.5 words take the place of two.
constexpr int kInt8PieceBytes = 4 * sizeof(int16_t);
constexpr int kInt8ColumnRoom = 2 * sizeof(int16_t);

// Up to so many blocks that meet a tile ask for the next one meanwhile. With more, the hardware's own prefetching is in
// time, and asking costs more than it gives.
constexpr int kMostAskingBlocks = 4;

// Instead of kNearBytes. On Zen 3 512 and 2048 make a row of int8 take 3 to 5 % longer, or one of int4 5 %.
constexpr int64_t kAvx2NearBytes = 1536;

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

inline __m256i load(const void* address) { return _mm256_loadu_si256(static_cast<const __m256i*>(address)); }

inline void store(void* address, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(address), x); }

// Onto `sum`, in this order and no other: columns that are loaded early push sums out of the registers. And where they
// are: the compiler would make sums elsewhere and move them back.
inline void add_int32(__m256i& sum, __m256i x) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_int16(__m256i& sum, __m256i x) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

// Four columns of a row, for each of four outputs.
inline __m256i broadcast_words(const void* piece) {
  int64_t value;
  __builtin_memcpy(&value, piece, sizeof value);
  return _mm256_set1_epi64x(value);
}

// Sixteen weights as words: four columns of four outputs.
inline __m256i load_words(const uint8_t* weights) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
}

// The sums of eight outputs with a row, each in two neighbouring lanes, to results.
inline void int8_results(__m256i first_four, __m256i second_four, int32_t offset, __m256 scales, float row_scale,
                         float* out) {
  const __m256i pairs = _mm256_hadd_epi32(first_four, second_four);
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  const __m256i sum = _mm256_add_epi32(ordered, _mm256_set1_epi32(offset));
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales);
  _mm256_storeu_ps(out, _mm256_mul_ps(scaled, _mm256_set1_ps(row_scale)));
}

}  // namespace
}  // namespace mixtral
