// Quantising a row with AVX2: its scale, eight columns at a time, and what is too much of them for products of bytes.
//
// The product of bytes adds two products in 16 bits, which hold 128 times the largest weight. So where two neighbours of
// an int8 row are further from zero together, half of each stays and the rest is their excess, which meets the same
// weights in a piece of its own. Sums are exact: the results have the bits of one product. Of rows of normal numbers 15
// pieces in 1,000 have an excess, which costs 3 % of 256 rows' time; if all have one, twice the time.
//
// Included inside a translation unit's own target pragma, hence everything in an anonymous namespace.
#pragma once

#include <cstdint>
#include <limits>

#include "products.h"

namespace mixtral {
namespace {

constexpr int kLanes = 8;

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

// How a row is quantised; a row that cannot be used as if it had no columns: to zeros.
struct RowScale {
  float scale = 0.0f, inverse = 0.0f;
  bool usable = false;

  static RowScale of(const float* x, int64_t num_cols) {
    const uint32_t largest = largest_magnitude(x, num_cols);
    const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest))));
    if (largest >= 0x7f800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f, false};
    const float inverse = 127.0f / absmax;
    if (inverse > std::numeric_limits<float>::max()) return {};
    return {absmax / 127.0f, inverse, true};
  }

  // The first `count` of eight columns, zeros behind.
  __m256i quantized(const float* x, int64_t count) const {
    return _mm256_cvtps_epi32(_mm256_mul_ps(load_part(x, usable ? count : 0), _mm256_set1_ps(inverse)));
  }
};

// Four columns of an int8 row that meet their weights once more.
struct Excess {
  int32_t line;  // bytes from the tile's first weight to theirs; kNoMore ends a row's
  int8_t columns[4];
};
constexpr int32_t kNoMore = -1;
static_assert(kGroupCols / 4 * sizeof(Excess) == 64 && alignof(Excess) <= 64, "it lies in excess_bytes()");

// Writes the excess of a row.
class ExcessWriter {
 public:
  ExcessWriter(const RowPlace& place, int64_t num_groups)
      : next_(reinterpret_cast<Excess*>(place.quants + excess_offset(place.num_block_rows, num_groups, place.row))) {}

  void end() { next_->line = kNoMore; }

  // What stays of the eight columns from `first` on, words [0..3, 0..3, 4..7, 4..7].
  __m256i take_from(__m256i words, int64_t first) {
    const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    const __m256i too_much = _mm256_cmpgt_epi32(_mm256_abs_epi32(pairs), _mm256_set1_epi32(128));
    if (_mm256_testz_si256(too_much, too_much)) return words;
    const __m256i kept = _mm256_blendv_epi8(words, _mm256_srai_epi16(words, 1), too_much);
    const __m256i rest = _mm256_sub_epi16(words, kept), bytes = _mm256_packs_epi16(rest, rest);
    add(first, _mm256_extract_epi32(bytes, 0));
    add(first + 4, _mm256_extract_epi32(bytes, 4));
    return kept;
  }

 private:
  void add(int64_t first, int32_t columns) {
    if (columns == 0) return;
    next_->line = static_cast<int32_t>(first * kTileRows);
    __builtin_memcpy(next_->columns, &columns, sizeof columns);
    ++next_;
  }

  Excess* next_;
};

}  // namespace
}  // namespace mixtral
