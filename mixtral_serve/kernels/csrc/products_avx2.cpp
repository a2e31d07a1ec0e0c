// products.h for AVX2: eight outputs in the lanes, so a tile is two halves. Wide blocks are in products_avx2_wide.cpp.
//
// Sixteen registers hold the sums of a few rows only, so a block meets a tile in several passes: a stretch of columns
// at a time, which stays in the first-level cache for all of them. Between stretches the sums lie in memory.
//
// The byte product of AVX2 adds two products in 16 bits and saturates. int4: 0..15 times -127..127 leaves room for the
// eight pairs of a group, and the product of 16 bits that widens them multiplies by the group's multiplier as well; each
// of a sum's two words starts at an offset of its own, and stays within 16 columns of -8 times 127. int8: rows lie in
// memory as 16-bit numbers, weights are widened as they are loaded, once for all rows, and the product of 16 bits adds
// pairs in 32: as many multiplications as bytes would take (|weight| times the row with the weight's sign, then the
// widening), without the signs.
//
// Rejected for int8: the signs (they compete with the products for the same units: a sixth slower on Zen 4). Rejected:
// whole rows instead of stretches (256 rows of int4, through the second-level cache, took 1.4 to 1.7 times as long on
// Zen 3).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "math.h"
#include "products.h"

#if defined(__x86_64__)
#include "avx2_target.h"

#include "math_avx2.h"
#include "products_avx2.h"
#include "rows_avx2.h"

namespace mixtral {
namespace {

// More are faster as pairs, by a tenth from 30 rows on.
constexpr int64_t kMostNarrowInt8Rows = 24;
static_assert(7 * (kMostNarrowInt8Rows + 2) <= 8 * (kMostNarrowInt8Rows + 1), "pairs of an odd number of rows fit");

// Writes eight columns as two pieces, of bytes (int4) or of words.
inline void write_8(Kind kind, __m256i columns, int8_t* out, int64_t distance) {
  const __m256i words = _mm256_packs_epi32(columns, columns);
  if (kind == Kind::int8) {
    _mm_storeu_si64(out, _mm256_castsi256_si128(words));
    _mm_storeu_si64(out + distance, _mm256_extracti128_si256(words, 1));
    return;
  }
  const __m256i bytes = _mm256_packs_epi16(words, words);
  _mm_storeu_si32(out, _mm256_castsi256_si128(bytes));
  _mm_storeu_si32(out + distance, _mm256_extracti128_si256(bytes, 1));
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
  const RowScale scale = RowScale::of(x, num_cols);
  *place.scale = scale.scale;
  const int64_t piece_bytes = kind == Kind::int8 ? kInt8PieceBytes : 4, distance = piece_bytes * place.num_block_rows;
  int8_t* first_piece = place.quants + piece_bytes * place.row;
  __m256i row_sum = _mm256_setzero_si256();
  for (int64_t g = 0; g < num_groups; ++g) {
    __m256i sum = _mm256_setzero_si256();
    MIXTRAL_UNROLL
    for (int i = 0; i < kGroupCols / kLanes; ++i) {
      const int64_t first = g * kGroupCols + i * kLanes;
      const __m256i columns = scale.quantized(x + first, num_cols - first);
      write_8(kind, columns, first_piece + (g * 8 + 2 * i) * distance, distance);
      sum = _mm256_add_epi32(sum, columns);
    }
    if (kind == Kind::int4) place.offsets[g * place.num_block_rows + place.row] = int4_offsets(sum);
    row_sum = _mm256_add_epi32(row_sum, sum);
  }
  if (kind == Kind::int8) place.offsets[place.row] = -128 * sum_of(row_sum);
}

// Groups of columns that all passes of a block meet before the next; in int4, of one section.
struct Stretch {
  int64_t first_group, num_groups;
};

// Four bytes. In the domain of floats since GCC would take integers through a register and the stack.
inline __m256i broadcast(const void* piece) {
  return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(piece)));
}

// Adds a stretch of columns to the sums of rows first..first + kRows - 1 of the block with kHalves halves of a tile,
// from half `half` on: two sums of every output.
template <int kRows, int kHalves, bool kAsks>
void int8_pass(const Block& block, int first, const Tile& tile, const Stretch& stretch, int half, Ahead ahead,
               int32_t* all_sums) {
  constexpr int kQuarters = 2 * kHalves;
  all_sums += (first * 4 + 2 * half) * kLanes;
  __m256i sums[kRows][kQuarters];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int q = 0; q < kQuarters; ++q) sums[r][q] = load(all_sums + (4 * r + q) * kLanes);
  }
  const uint8_t* line = tile.quants + stretch.first_group * 512 + 32 * half;
  const int8_t* row = block.quants + kInt8PieceBytes * (stretch.first_group * 8 * block.num_rows + first);
  const uint8_t* const end = line + stretch.num_groups * 512;
  const int64_t row_step = kInt8PieceBytes * block.num_rows;
  ahead.quants += stretch.first_group * 8 * ahead.step;
#pragma GCC unroll 2
  for (; line != end; line += 64, row += row_step, ahead.quants += ahead.step) {
    if (kAsks) prefetch(ahead.quants);
    __m256i weights[kQuarters];
    MIXTRAL_UNROLL
    for (int q = 0; q < kQuarters; ++q) weights[q] = load_words(line + 16 * q);
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256i columns = broadcast_words(row + kInt8PieceBytes * r);
      MIXTRAL_UNROLL
      for (int q = 0; q < kQuarters; ++q) {
        add_int32(sums[r][q], _mm256_madd_epi16(weights[q], columns));
      }
    }
  }
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int q = 0; q < kQuarters; ++q) store(all_sums + (4 * r + q) * kLanes, sums[r][q]);
  }
}

// Sums of all columns to results.
void int8_finish(const Block& block, const Tile& tile, const Stretch&, int32_t* sums, float* out, int64_t stride) {
  for (int h = 0; h < 2; ++h) {
    const __m256 scales = _mm256_loadu_ps(static_cast<const float*>(tile.scales) + kLanes * h);
    for (int r = 0; r < block.num_rows; ++r) {
      const int32_t* mine = sums + (r * 4 + 2 * h) * kLanes;
      int8_results(load(mine), load(mine + kLanes), block.offsets[r], scales, block.scales[r],
                   out + r * stride + kLanes * h);
    }
  }
}

// Four columns of rows with both halves of a tile.
template <int kRows>
inline void int4_columns(__m256i low_half, __m256i high_half, const int8_t* row, __m256i (&sums)[kRows][2]) {
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const __m256i columns = broadcast(row + 4 * r);
    add_int16(sums[r][0], _mm256_maddubs_epi16(low_half, columns));
    add_int16(sums[r][1], _mm256_maddubs_epi16(high_half, columns));
  }
}

// Sums of rows with one group of a tile, which begin at their offsets. Columns lie `step` apart.
template <int kRows, bool kAsks>
inline void int4_group(const uint8_t* group, const int8_t* row, int64_t step, const int32_t* offsets, Ahead& ahead,
                       __m256i (&sums)[kRows][2]) {
  const __m256i mask = _mm256_set1_epi8(15);
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = broadcast(offsets + r);
  for (int v = 0; v < 4; ++v, group += 64, row += 2 * step, ahead.quants += ahead.step) {
    if (kAsks) prefetch(ahead.quants);
    __m256i low = load(group), high = load(group + 32);
    asm volatile("" : "+x"(low), "+x"(high));  // once
    int4_columns<kRows>(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask), row, sums);
    low = _mm256_and_si256(_mm256_srli_epi16(low, 4), mask), high = _mm256_and_si256(_mm256_srli_epi16(high, 4), mask);
    int4_columns<kRows>(low, high, row + step, sums);
  }
}

// The multipliers of eight outputs, each in both words of its lane.
inline __m256i load_multipliers(const int8_t* multipliers) {
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadu_si64(multipliers));
  return _mm256_blend_epi16(lanes, _mm256_slli_epi32(lanes, 16), 0xaa);
}

// int8_pass for int4: one sum of every output, of a stretch within a section.
template <int kRows, bool kAsks>
void int4_pass(const Block& block, int first, const Tile& tile, const Stretch& stretch, int, Ahead ahead,
               int32_t* all_sums) {
  const SectionScales section = SectionScales::of(tile.scales, stretch.first_group / kSectionGroups, block.num_groups);
  const int64_t g0 = stretch.first_group, num_rows = block.num_rows, step = 4 * num_rows;
  const int8_t* multipliers = section.multipliers + g0 % kSectionGroups * kTileRows;
  const uint8_t* group = tile.quants + g0 * 256;
  const int8_t* row = block.quants + g0 * 8 * step + 4 * first;
  const int32_t* offsets = block.offsets + g0 * num_rows + first;
  all_sums += first * 2 * kLanes;
  ahead.quants += g0 * 4 * ahead.step;
  ahead.scales += g0 / 4 * ahead.step;
  for (int64_t g = 0; g < stretch.num_groups; ++g) {
    if (kAsks && g % 4 == 0) {
      prefetch(ahead.scales);
      ahead.scales += ahead.step;
    }
    asm volatile("" : "+r"(row), "+r"(all_sums));  // or GCC would keep an address for every place, on the stack
    __m256i sums[kRows][2];
    int4_group<kRows, kAsks>(group, row, step, offsets, ahead, sums);
    MIXTRAL_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256i words = load_multipliers(multipliers + kLanes * h);
      MIXTRAL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int32_t* sum = all_sums + (r * 2 + h) * kLanes;
        store(sum, _mm256_add_epi32(_mm256_madd_epi16(sums[r][h], words), load(sum)));
      }
    }
    group += 256, row += 8 * step, offsets += num_rows, multipliers += kTileRows;
  }
}

// Sums of a section to results, so far; those of the next section start anew.
void int4_finish(const Block& block, const Tile& tile, const Stretch& stretch, int32_t* sums, float* out,
                 int64_t stride) {
  const int64_t end = stretch.first_group + stretch.num_groups;
  const bool is_first = end <= kSectionGroups, is_last = end == block.num_groups;
  const SectionScales section = SectionScales::of(tile.scales, (end - 1) / kSectionGroups, block.num_groups);
  for (int h = 0; h < 2; ++h) {
    const __m256 scales = _mm256_loadu_ps(section.scales + kLanes * h);
    for (int r = 0; r < block.num_rows; ++r) {
      int32_t* mine = sums + (r * 2 + h) * kLanes;
      float* place = out + r * stride + kLanes * h;
      const __m256 before = is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(place);
      const __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(mine)), scales, before);
      _mm256_storeu_ps(place, is_last ? _mm256_mul_ps(total, _mm256_set1_ps(block.scales[r])) : total);
      store(mine, _mm256_setzero_si256());
    }
  }
}

using Pass = void (*)(const Block&, int, const Tile&, const Stretch&, int, Ahead, int32_t*);

// How a block meets a tile: `by_rows` - 1, up to `most_rows` at a time, with the whole of it or with one half after the
// other.
struct Passes {
  const Pass* by_rows;
  int most_rows;
  int num_halves;
};

// A pass takes as many rows as there are registers for their sums. kStretchGroups of a block and a tile fit into the
// first-level cache together; kFinish is due after kScaleGroups.
struct Int8 {
  template <bool kAsks>
  static constexpr Pass kWhole[] = {int8_pass<1, 2, kAsks>, int8_pass<2, 2, kAsks>, int8_pass<3, 2, kAsks>};
  template <bool kAsks>
  static constexpr Pass kHalf[] = {int8_pass<1, 1, kAsks>, int8_pass<2, 1, kAsks>, int8_pass<3, 1, kAsks>,
                                   int8_pass<4, 1, kAsks>, int8_pass<5, 1, kAsks>, int8_pass<6, 1, kAsks>};
  static constexpr int kOnePassRows = 3, kGroupLines = 8, kRowSums = 4 * kLanes;
  static constexpr int64_t kStretchGroups = 16, kScaleGroups = INT64_MAX;
  static constexpr auto kFinish = int8_finish;

  template <bool kAsks>
  static Passes passes_for(int rows) {
    return rows <= kOnePassRows ? Passes{kWhole<kAsks>, kOnePassRows, 1} : Passes{kHalf<kAsks>, 6, 2};
  }
};

struct Int4 {
  template <bool kAsks>
  static constexpr Pass kWhole[] = {int4_pass<1, kAsks>, int4_pass<2, kAsks>, int4_pass<3, kAsks>,
                                    int4_pass<4, kAsks>};
  static constexpr int kOnePassRows = 4, kGroupLines = 4, kRowSums = 2 * kLanes;
  static constexpr int64_t kStretchGroups = 32, kScaleGroups = kSectionGroups;
  static constexpr auto kFinish = int4_finish;

  template <bool kAsks>
  static Passes passes_for(int) {
    return {kWhole<kAsks>, kOnePassRows, 1};
  }
};

// All rows of a block, in passes of nearly equal size, with one stretch of a tile.
template <typename Format>
void multiply_stretch(const Block& block, const Tile& tile, const Stretch& stretch, Visit visit, int32_t* sums) {
  const bool asks = visit.count <= kMostAskingBlocks;
  const Passes passes =
      asks ? Format::template passes_for<true>(block.num_rows) : Format::template passes_for<false>(block.num_rows);
  const int num_passes = (block.num_rows + passes.most_rows - 1) / passes.most_rows;
  const int num_visits = num_passes * passes.num_halves;
  visit = {visit.index * num_visits, visit.count * num_visits};
  for (int pass = 0, first = 0; pass < num_passes; ++pass) {
    const int rows = (block.num_rows - first + num_passes - pass - 1) / (num_passes - pass);
    for (int half = 0; half < passes.num_halves; ++half, ++visit.index) {
      const Ahead ahead = ahead_of(tile, visit, block.num_groups * Format::kGroupLines, kAvx2NearBytes);
      passes.by_rows[rows - 1](block, first, tile, stretch, half, ahead, sums);
    }
    first += rows;
  }
}

template <typename Format>
void multiply_tile(const Block& block, const Tile& tile, const Visit& visit, float* out, int64_t stride) {
  alignas(32) int32_t sums[kNarrowBlockRows * Format::kRowSums];
  std::memset(sums, 0, sizeof(int32_t) * block.num_rows * Format::kRowSums);
  // One pass reads everything once, whatever the stretches.
  const int64_t most = block.num_rows <= Format::kOnePassRows ? kSectionGroups : Format::kStretchGroups;
  for (int64_t first = 0; first < block.num_groups; first += most) {
    const int64_t end = std::min(first + most, block.num_groups);
    const Stretch stretch{first, end - first};
    multiply_stretch<Format>(block, tile, stretch, visit, sums);
    if (end == block.num_groups || end % Format::kScaleGroups == 0) {
      Format::kFinish(block, tile, stretch, sums, out, stride);
    }
  }
}

template <typename Format>
void multiply(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  for (int b = 0; b < num_blocks; out += blocks[b].num_rows * stride, ++b) {
    for (int t = 0; t < num_tiles; ++t) {
      multiply_tile<Format>(blocks[b], tiles[t], {b, num_blocks}, out + t * kTileRows, stride);
    }
  }
}

void multiply_int8(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  const Multiply of_blocks = blocks[0].is_wide ? multiply_int8_wide_avx2 : multiply<Int8>;
  of_blocks(blocks, num_blocks, tiles, num_tiles, out, stride);
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
      kInt8ColumnRoom, {kMostNarrowInt8Rows, kAllNarrow}, kAvx2WideRows,  quantize_row, quantize_int8_pair_avx2,
      multiply_int8,   multiply<Int4>,                    gate,           combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
