// products.h for AVX2: eight outputs in the lanes, so a tile is two halves.
//
// The byte product of AVX2 adds two products in 16 bits and saturates. int4: 0..15 times -127..127 leaves room for the
// eight pairs of a group, and the product of 16 bits that widens them multiplies by the group's multiplier as well; each
// of a sum's two words starts at an offset of its own, and stays within 16 columns of -8 times 127. int8: rows lie in memory as 16-bit numbers, weights are
// widened as they are loaded, once for all rows, and the product of 16 bits adds pairs in 32: as many multiplications
// as bytes would take (|weight| times the row with the weight's sign, then the widening), without the signs.
//
// Rejected for int8: the signs (they compete with the products for the same units: a sixth slower on Zen 4).
#include <cstdint>
#include <limits>

#include "math.h"
#include "products.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#include <immintrin.h>

#include "math_avx2.h"

#define MIXTRAL_UNROLL _Pragma("GCC unroll 8")

namespace mixtral {
namespace {

constexpr int kLanes = 8;
constexpr int kInt8ColumnBytes = 2;
// More rows are multiplied in passes of at most so many, with one half of a tile: sums must fit in 16 registers.
constexpr int kInt8Rows = 6;
constexpr int kInt4Rows = 4;
// Up to so many rows meet both halves of a tile at once, so that a tile is read once.
constexpr int kBothHalvesRows = 3;

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

inline __m256i load(const void* address) { return _mm256_loadu_si256(static_cast<const __m256i*>(address)); }

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

inline __m256i broadcast(const int8_t* piece) {
  int32_t value;
  __builtin_memcpy(&value, piece, sizeof value);
  return _mm256_set1_epi32(value);
}

inline __m256i broadcast_words(const int8_t* piece) {
  int64_t value;
  __builtin_memcpy(&value, piece, sizeof value);
  return _mm256_set1_epi64x(value);
}

// Sixteen weights as words: four columns of four outputs.
inline __m256i load_words(const uint8_t* weights) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
}

// Rows first..first + kRows - 1 of the block with kHalves halves of a tile, from half `half` on.
template <int kRows, int kHalves>
void int8_pass(const Block& block, int first, const Tile& tile, const Visit& visit, int half, float* out,
               int64_t stride) {
  constexpr int kQuarters = 2 * kHalves, kPieceBytes = 4 * kInt8ColumnBytes;
  __m256i sums[kRows][kQuarters];  // two sums of each of four outputs
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int q = 0; q < kQuarters; ++q) sums[r][q] = _mm256_setzero_si256();
  }
  const uint8_t* line = tile.quants + 32 * half;
  const int8_t* row = block.quants + kPieceBytes * first;
  const int64_t num_lines = block.num_groups * 8;
  Ahead ahead = ahead_of(tile, visit, num_lines);
  for (int64_t c = 0; c < num_lines; ++c, line += 64, row += kPieceBytes * block.num_rows, ahead.quants += ahead.step) {
    if (kRows > 2) prefetch(ahead.quants);
    __m256i weights[kQuarters];
    MIXTRAL_UNROLL
    for (int q = 0; q < kQuarters; ++q) weights[q] = load_words(line + 16 * q);
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256i columns = broadcast_words(row + kPieceBytes * r);
      MIXTRAL_UNROLL
      for (int q = 0; q < kQuarters; ++q) {
        sums[r][q] = _mm256_add_epi32(sums[r][q], _mm256_madd_epi16(weights[q], columns));
        // In this order and no other: columns that are loaded early push sums out of the registers.
        asm volatile("" : "+x"(sums[r][q]));
      }
    }
  }
  MIXTRAL_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    const __m256 scales = _mm256_loadu_ps(static_cast<const float*>(tile.scales) + kLanes * (half + h));
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256i pairs = _mm256_hadd_epi32(sums[r][2 * h], sums[r][2 * h + 1]);
      const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
      const __m256i sum = _mm256_add_epi32(ordered, _mm256_set1_epi32(block.offsets[first + r]));
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales);
      _mm256_storeu_ps(out + (first + r) * stride + kLanes * (half + h),
                       _mm256_mul_ps(scaled, _mm256_set1_ps(block.scales[first + r])));
    }
  }
}

template <int kRows>
inline void int4_line(const uint8_t* line, const int8_t* row, int64_t num_block_rows, __m256i (&sums)[kRows]) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i both = load(line);
  const __m256i low = _mm256_and_si256(both, mask);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(low, broadcast(row + 4 * r)));
    sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(high, broadcast(row + 4 * (num_block_rows + r))));
  }
}

// The multipliers of eight outputs, each in both words of its lane.
inline __m256i load_multipliers(const int8_t* multipliers) {
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadu_si64(multipliers));
  return _mm256_blend_epi16(lanes, _mm256_slli_epi32(lanes, 16), 0xaa);
}

// Adds group `g` of one half of a tile to the section's sums of rows first .. first + kRows - 1.
template <int kRows>
inline void int4_group(const Block& block, int first, const uint8_t* half_group, const int8_t* multipliers, int64_t g,
                       __m256i (&section_sums)[kRows]) {
  const int8_t* row = block.quants + (g * 8 * block.num_rows + first) * 4;
  __m256i sums[kRows];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = _mm256_set1_epi32(block.offsets[g * block.num_rows + first + r]);
#pragma GCC unroll 1  // or broadcasts of later lines are loaded early, and push sums out of the registers
  for (int v = 0; v < 4; ++v) {
    int4_line<kRows>(half_group + v * 64, row + v * 8 * block.num_rows, block.num_rows, sums);
  }
  const __m256i words = load_multipliers(multipliers);
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    section_sums[r] = _mm256_add_epi32(section_sums[r], _mm256_madd_epi16(sums[r], words));
  }
}

// Adds one section of kHalves halves of a tile, from half `half` on, to the totals.
template <int kRows, int kHalves>
inline void int4_section(const Block& block, int first, const Tile& tile, int half, int64_t s, Ahead& ahead,
                         __m256 (&totals)[kHalves][kRows]) {
  const SectionScales section = SectionScales::of(tile.scales, s, block.num_groups);
  __m256i sums[kHalves][kRows];
  MIXTRAL_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) sums[h][r] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < section.num_groups; ++i) {
    MIXTRAL_UNROLL
    for (int v = 0; v < 4; ++v) prefetch(ahead.quants + v * ahead.step);
    ahead.quants += 4 * ahead.step;
    if (i % 4 == 0) {
      prefetch(ahead.scales);
      ahead.scales += ahead.step;
    }
    const int64_t g = s * kSectionGroups + i;
    MIXTRAL_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      const uint8_t* half_group = tile.quants + g * 256 + 32 * (half + h);
      int4_group<kRows>(block, first, half_group, section.multipliers + i * kTileRows + kLanes * (half + h), g, sums[h]);
    }
  }
  MIXTRAL_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    const __m256 scales = _mm256_loadu_ps(section.scales + kLanes * (half + h));
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) totals[h][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[h][r]), scales, totals[h][r]);
  }
}

template <int kRows, int kHalves>
void int4_pass(const Block& block, int first, const Tile& tile, const Visit& visit, int half, float* out,
               int64_t stride) {
  __m256 totals[kHalves][kRows];
  MIXTRAL_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) totals[h][r] = _mm256_setzero_ps();
  }
  Ahead ahead = ahead_of(tile, visit, block.num_groups * 4);
  for (int64_t s = 0; s < sections_of(block.num_groups); ++s) {
    int4_section<kRows, kHalves>(block, first, tile, half, s, ahead, totals);
  }
  MIXTRAL_UNROLL
  for (int h = 0; h < kHalves; ++h) {
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      _mm256_storeu_ps(out + (first + r) * stride + kLanes * (half + h),
                       _mm256_mul_ps(totals[h][r], _mm256_set1_ps(block.scales[first + r])));
    }
  }
}

using PassKernel = void (*)(const Block&, int, const Tile&, const Visit&, int, float*, int64_t);

struct Passes {
  PassKernel both_halves[kBothHalvesRows];  // by rows - 1
  PassKernel one_half[kInt8Rows];
  int most_rows;
};

constexpr Passes kInt8Passes = {{int8_pass<1, 2>, int8_pass<2, 2>, int8_pass<3, 2>},
                                {int8_pass<1, 1>, int8_pass<2, 1>, int8_pass<3, 1>, int8_pass<4, 1>, int8_pass<5, 1>,
                                 int8_pass<6, 1>},
                                kInt8Rows};
constexpr Passes kInt4Passes = {
    {int4_pass<1, 2>, int4_pass<2, 2>, int4_pass<3, 2>},
    {int4_pass<1, 1>, int4_pass<2, 1>, int4_pass<3, 1>, int4_pass<4, 1>, nullptr, nullptr},
    kInt4Rows};

// All rows of a block, in passes of nearly equal size, with one tile.
void multiply_tile(const Passes& passes, const Block& block, const Tile& tile, Visit visit, float* out,
                   int64_t stride) {
  if (block.num_rows <= kBothHalvesRows) {
    return passes.both_halves[block.num_rows - 1](block, 0, tile, visit, 0, out, stride);
  }
  const int num_passes = (block.num_rows + passes.most_rows - 1) / passes.most_rows;
  visit = {visit.index * 2 * num_passes, visit.count * 2 * num_passes};
  for (int pass = 0, first = 0; pass < num_passes; ++pass) {
    const int rows = (block.num_rows - first + num_passes - pass - 1) / (num_passes - pass);
    for (int half = 0; half < 2; ++half, ++visit.index) {
      passes.one_half[rows - 1](block, first, tile, visit, half, out, stride);
    }
    first += rows;
  }
}

template <const Passes* passes>
void multiply(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  for (int b = 0; b < num_blocks; out += blocks[b].num_rows * stride, ++b) {
    for (int t = 0; t < num_tiles; ++t) {
      multiply_tile(*passes, blocks[b], tiles[t], {b, num_blocks}, out + t * kTileRows, stride);
    }
  }
}

void gate(const float* both, int num_rows, float* out, int64_t stride) {
  for (int r = 0; r < num_rows; ++r) {
    const float* row = both + r * 2 * kTileRows;
    for (int o = 0; o < kTileRows; o += kLanes) {
      const __m256 up = _mm256_loadu_ps(row + kTileRows + o);
      _mm256_storeu_ps(out + r * stride + o, _mm256_mul_ps(silu_f32x8(_mm256_loadu_ps(row + o)), up));
    }
  }
}

void combine(const float* const* parts, const float* weights, int64_t k, int64_t num_cols, float* out) {
  const int64_t whole = num_cols / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < k; ++i) {
      sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[i]), _mm256_loadu_ps(parts[i] + c), sum);
    }
    _mm256_storeu_ps(out + c, sum);
  }
  for (int64_t c = whole; c < num_cols; ++c) {
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum = __builtin_fmaf(weights[i], parts[i][c], sum);
    out[c] = sum;
  }
}

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = {
      kInt8ColumnBytes,         {kAllNarrow, kAllNarrow}, quantize_row, multiply<&kInt8Passes>,
      multiply<&kInt4Passes>, gate,                     combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
