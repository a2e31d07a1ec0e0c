// products.h for AVX2: eight outputs in the lanes, so a tile is two halves.
//
// Sixteen registers hold the sums of a few rows only, so a block meets a tile in several passes: a stretch of columns
// at a time, which stays in the first-level cache for all of them. Between stretches the sums lie in memory.
//
// The byte product of AVX2 adds two products in 16 bits and saturates. int4: 0..15 times -127..127 leaves room for the
// eight pairs of a group, and the product of 16 bits that widens them multiplies by the group's multiplier as well; each
// of a sum's two words starts at an offset of its own, and stays within 16 columns of -8 times 127. int8: a pair is
// widened at once. Few pairs of columns are too large for 16 bits, and what is too much is multiplied in a piece of its
// own; see rows_avx2.h.
//
// Rejected for int8: products of words (as many multiplications, twice the additions, and half of the units that add are
// those that multiply: bytes take 1.2 to 1.4 times less time); the same by Strassen's algorithm (seven products of words
// for eight, more memory per row, and a tenth faster than words only); |weight| times the row with the weight's sign
// (signs compete with the products for the same units: a sixth slower than words on Zen 4).
// Rejected: whole rows instead of stretches (256 rows of int4, through the second-level cache, took 1.4 to 1.7 times as
// long on Zen 3); blocks of more rows (as fast).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "math.h"
#include "products.h"

#if defined(__x86_64__)
#include "avx2_target.h"

#include "math_avx2.h"
#include "rows_avx2.h"

namespace mixtral {
namespace {

// Up to so many blocks that meet a tile ask for the next one meanwhile. With more, the hardware's own prefetching is in
// time, and asking costs more than it gives.
constexpr int kMostAskingBlocks = 4;

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

inline __m256i load(const void* address) { return _mm256_loadu_si256(static_cast<const __m256i*>(address)); }

inline void store(void* address, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(address), x); }

// Onto `sum`, in this order and no other: columns that are loaded early push sums out of the registers. And where they
// are: the compiler would make sums elsewhere and move them back.
inline void add_int32(__m256i& sum, __m256i x) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_int16(__m256i& sum, __m256i x) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

// Writes eight columns, words [0..3, 0..3, 4..7, 4..7], as two pieces of bytes.
inline void write_8(__m256i words, int8_t* out, int64_t distance) {
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

void quantize_int8_row(const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const RowScale scale = RowScale::of(x, num_cols);
  *place.scale = scale.scale;
  const int64_t distance = 4 * place.num_block_rows;
  int8_t* piece = place.quants + 4 * place.row;
  ExcessWriter excess(place, num_groups);
  __m256i row_sum = _mm256_setzero_si256();
  for (int64_t first = 0; first < num_groups * kGroupCols; first += kLanes, piece += 2 * distance) {
    const __m256i columns = scale.quantized(x + first, num_cols - first);
    write_8(excess.take_from(_mm256_packs_epi32(columns, columns), first), piece, distance);
    row_sum = _mm256_add_epi32(row_sum, columns);
  }
  place.offsets[place.row] = -128 * sum_of(row_sum);
  excess.end();
}

void quantize_int4_row(const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const RowScale scale = RowScale::of(x, num_cols);
  *place.scale = scale.scale;
  const int64_t distance = 4 * place.num_block_rows;
  int8_t* piece = place.quants + 4 * place.row;
  for (int64_t g = 0; g < num_groups; ++g) {
    __m256i sum = _mm256_setzero_si256();
    MIXTRAL_UNROLL
    for (int i = 0; i < kGroupCols / kLanes; ++i, piece += 2 * distance) {
      const int64_t first = g * kGroupCols + i * kLanes;
      const __m256i columns = scale.quantized(x + first, num_cols - first);
      write_8(_mm256_packs_epi32(columns, columns), piece, distance);
      sum = _mm256_add_epi32(sum, columns);
    }
    place.offsets[g * place.num_block_rows + place.row] = int4_offsets(sum);
  }
}

void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  (kind == Kind::int4 ? quantize_int4_row : quantize_int8_row)(x, num_cols, num_groups, place);
}

// Groups of columns that all passes of a block meet before the next; in int4, of one section.
struct Stretch {
  int64_t first_group, num_groups;
};

// Neighbouring words, added. The ones come from memory: all registers but four hold sums.
inline __m256i sum_of_words(__m256i words) {
  alignas(32) static constexpr int16_t kOnes[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  asm("vpmaddwd %1, %0, %0" : "+x"(words) : "m"(kOnes));
  return words;
}

// Four bytes. In the domain of floats since GCC would take integers through a register and the stack.
inline __m256i broadcast(const void* piece) {
  return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(piece)));
}

// Adds a stretch of columns to the sums of rows first..first + kRows - 1 of the block with a tile.
template <int kRows, bool kAsks>
void int8_pass(const Block& block, int first, const Tile& tile, const Stretch& stretch, Ahead ahead,
               int32_t* all_sums) {
  all_sums += first * 2 * kLanes;
  __m256i sums[kRows][2];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int h = 0; h < 2; ++h) sums[r][h] = load(all_sums + (2 * r + h) * kLanes);
  }
  const uint8_t* line = tile.quants + stretch.first_group * 512;
  const int8_t* row = block.quants + 4 * (stretch.first_group * 8 * block.num_rows + first);
  const uint8_t* const end = line + stretch.num_groups * 512;
  const int64_t row_step = 4 * block.num_rows;
  ahead.quants += stretch.first_group * 8 * ahead.step;
#pragma GCC unroll 4
  for (; line != end; line += 64, row += row_step, ahead.quants += ahead.step) {
    if (kAsks) prefetch(ahead.quants);
    __m256i low_half = load(line), high_half = load(line + 32);
    asm volatile("" : "+x"(low_half), "+x"(high_half));  // once
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256i columns = broadcast(row + 4 * r);
      add_int32(sums[r][0], sum_of_words(_mm256_maddubs_epi16(low_half, columns)));
      add_int32(sums[r][1], sum_of_words(_mm256_maddubs_epi16(high_half, columns)));
    }
  }
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int h = 0; h < 2; ++h) store(all_sums + (2 * r + h) * kLanes, sums[r][h]);
  }
}

// Adds the excess of a row to its sums.
inline void add_excess(const Block& block, int row, const Tile& tile, int32_t* all_sums) {
  auto* excess = reinterpret_cast<const Excess*>(block.quants + excess_offset(block.num_rows, block.num_groups, row));
  __m256i sums[2] = {load(all_sums), load(all_sums + kLanes)};
  for (; excess->line != kNoMore; ++excess) {
    const uint8_t* line = tile.quants + excess->line;
    const __m256i columns = broadcast(excess->columns);
    add_int32(sums[0], sum_of_words(_mm256_maddubs_epi16(load(line), columns)));
    add_int32(sums[1], sum_of_words(_mm256_maddubs_epi16(load(line + 32), columns)));
  }
  store(all_sums, sums[0]), store(all_sums + kLanes, sums[1]);
}

// Sums of all columns to results.
void int8_finish(const Block& block, const Tile& tile, const Stretch&, int32_t* sums, float* out, int64_t stride) {
  const auto* all_scales = static_cast<const float*>(tile.scales);
  for (int r = 0; r < block.num_rows; ++r, sums += 2 * kLanes, out += stride) {
    add_excess(block, r, tile, sums);
    const __m256i offset = _mm256_set1_epi32(block.offsets[r]);
    const __m256 row_scale = _mm256_set1_ps(block.scales[r]);
    for (int o = 0; o < kTileRows; o += kLanes) {
      const __m256 total = _mm256_cvtepi32_ps(_mm256_add_epi32(load(sums + o), offset));
      _mm256_storeu_ps(out + o, _mm256_mul_ps(_mm256_mul_ps(total, _mm256_loadu_ps(all_scales + o)), row_scale));
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
void int4_pass(const Block& block, int first, const Tile& tile, const Stretch& stretch, Ahead ahead,
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

using Pass = void (*)(const Block&, int, const Tile&, const Stretch&, Ahead, int32_t*);

// Of a block and a tile, so many fit into the first-level cache together.
constexpr int64_t kStretchGroups = 32;

// A pass takes as many rows as there are registers for their sums: kPasses by their number, less 1. kFinish is due
// after kScaleGroups. kNearBytes takes the place of products.h's: on Zen 3 512 bytes more or less make a row of int8
// take 1 to 3 % longer, and 256 less one of int4 1 %.
struct Int8 {
  template <bool kAsks>
  static constexpr Pass kPasses[] = {int8_pass<1, kAsks>, int8_pass<2, kAsks>, int8_pass<3, kAsks>,
                                     int8_pass<4, kAsks>, int8_pass<5, kAsks>, int8_pass<6, kAsks>};
  static constexpr int kPassRows = 6, kGroupLines = 8;
  static constexpr int64_t kScaleGroups = INT64_MAX, kNearBytes = 1024;
  static constexpr auto kFinish = int8_finish;
};

struct Int4 {
  template <bool kAsks>
  static constexpr Pass kPasses[] = {int4_pass<1, kAsks>, int4_pass<2, kAsks>, int4_pass<3, kAsks>,
                                     int4_pass<4, kAsks>};
  static constexpr int kPassRows = 4, kGroupLines = 4;
  static constexpr int64_t kScaleGroups = kSectionGroups, kNearBytes = 1536;
  static constexpr auto kFinish = int4_finish;
};

// products.h's, with this format's distance ahead where a tile is met once. Were the distance an argument there, GCC
// would make other code of products_avx512.cpp, whose code is to stay as it was tried (ADR 6).
template <typename Format>
Ahead ahead_in_format(const Tile& tile, const Visit& visit, int64_t num_groups) {
  if (visit.count > 1) return ahead_of(tile, visit, num_groups * Format::kGroupLines);
  return {reinterpret_cast<const char*>(tile.quants) + Format::kNearBytes,
          static_cast<const char*>(tile.scales) + Format::kNearBytes / 16, 64};
}

// All rows of a block, in passes of nearly equal size, with one stretch of a tile.
template <typename Format>
void multiply_stretch(const Block& block, const Tile& tile, const Stretch& stretch, Visit visit, int32_t* sums) {
  const Pass* by_rows =
      visit.count <= kMostAskingBlocks ? Format::template kPasses<true> : Format::template kPasses<false>;
  const int num_passes = (block.num_rows + Format::kPassRows - 1) / Format::kPassRows;
  visit = {visit.index * num_passes, visit.count * num_passes};
  for (int pass = 0, first = 0; pass < num_passes; ++pass, ++visit.index) {
    const int rows = (block.num_rows - first + num_passes - pass - 1) / (num_passes - pass);
    const Ahead ahead = ahead_in_format<Format>(tile, visit, block.num_groups);
    by_rows[rows - 1](block, first, tile, stretch, ahead, sums);
    first += rows;
  }
}

template <typename Format>
void multiply_tile(const Block& block, const Tile& tile, const Visit& visit, float* out, int64_t stride) {
  alignas(32) int32_t sums[kNarrowBlockRows * 2 * kLanes];
  std::memset(sums, 0, sizeof(int32_t) * block.num_rows * 2 * kLanes);
  // One pass reads everything once, whatever the stretches.
  const int64_t most = block.num_rows <= Format::kPassRows ? kSectionGroups : kStretchGroups;
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
  static constexpr Kernels kernels = {{kAllNarrow, kAllNarrow}, 0,   quantize_row, multiply<Int8>, multiply<Int4>,
                                      gate,                     combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
