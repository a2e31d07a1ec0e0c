// products.h for AMX: sixteen rows and sixteen outputs in a tile register, 64 columns per instruction. A line of packed
// weights is a row of the operand as it lies; few rows, which wait for memory, are left to AVX-512.
//
// int8    up to two tiles of rows times two of outputs. Weights keep their offset: the sum is unsigned by signed.
// int4    a weight is a nibble times its group's multiplier, up to 127: one byte for the multiplier's high digit and one
//         for its low one (base 16), made once for all rows of a run. Two sums of integers over a whole section then
//         stand for one, and nothing is converted to floating point in between.
//
// A block's rows are two tiles of nearly equal size, or one. A smaller block that follows is read as if it had one row
// more, which is memory of the rows' own, and what comes of it is not looked at.
//
// Rejected: one sum per group, scaled in floating point (the tiles' way through memory and the conversions took three
// times as long as the products).
#include <cstdint>
#include <limits>

#include "products.h"

#if defined(__x86_64__)
#include "avx512_target.h"

#include "amx_tiles.h"
#include "rows_avx512.h"

namespace mixtral {
namespace {

constexpr int kStepCols = 64;  // columns of one instruction
constexpr int64_t kStepBytes = 16 * 64;
// Steps of int4 weights that all blocks of a run meet while their digits lie in the first-level cache: 16 KB.
constexpr int64_t kStretchSteps = 8;
static_assert(kSectionGroups % (2 * kStretchSteps) == 0, "a section is whole stretches, of two groups a step");
// So few rows are done sooner by AVX-512: of int8 one, of int4 those for which making the digits does not pay.
constexpr int64_t kMostNarrowInt8Rows = 1, kMostNarrowInt4Rows = 12;
static_assert(kMostNarrowInt4Rows <= kNarrowBlockRows, "whoever is left to AVX-512 is one block");

constexpr int kWideBlockRows = 32;
constexpr int kMaxWideBlocks = kMaxRunRows / kWideBlockRows;

// Tile registers: sums of (rows, weights), both 0 or 1; rows; weights.
constexpr int sums(int rows, int weights) { return 2 * rows + weights; }
constexpr int kRows = 4, kWeights = 6;

// Asks for lines that will be written after what is computed now.
inline void ask_for_results(const float* out, int num_rows, int num_tiles, int64_t stride) {
  for (int r = 0; r < num_rows; ++r, out += stride) {
    for (int t = 0; t < num_tiles; ++t) __builtin_prefetch(out + t * kTileRows, 1);
  }
}

// How the rows of a block are cut into tiles, and the registers' shapes while it lives.
class Tiles {
 public:
  explicit Tiles(int num_rows) : first_(num_rows <= 16 ? num_rows : (num_rows + 1) / 2), second_(num_rows - first_) {
    TileShapes shapes;
    for (int w = 0; w < 2; ++w) {
      shapes.set(sums(0, w), first_);
      shapes.set(sums(1, w), second_);
      shapes.set(kWeights + w, 16);
    }
    shapes.set(kRows, first_);
    shapes.set(kRows + 1, second_);
    take_tiles(shapes);
  }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  int first() const { return first_; }
  bool are_two() const { return second_ > 0; }

 private:
  int first_, second_;
};

// What the registers of sums are stored to: [rows' tile][weights' tile][row][output].
struct alignas(64) Sums {
  int32_t at[2][2][16][kTileRows];

  // Of row `row` of a block whose first tile has `first` rows.
  __m512i of(int row, int first, int weights) const {
    return _mm512_load_si512(row < first ? at[0][weights][row] : at[1][weights][row - first]);
  }
};

// A stretch of up to two operands.
struct Operands {
  const void* first;
  const void* second;
  int64_t num_steps;
};

// Where the sums of a stretch begin and stay.
struct Stretch {
  bool is_first;   // from zero
  bool is_last;    // to memory
  bool is_shared;  // the registers are somebody else's in between: from memory and to memory
};

template <bool two_rows, bool two_weights, bool is_signed>
inline void multiply_step(const int8_t* rows, int first_rows, const void* first, const void* second) {
  load_tile<kRows>(rows);
  load_tile<kWeights>(first);
  multiply_tiles<sums(0, 0), kRows, kWeights, is_signed>();
  if (two_weights) load_tile<kWeights + 1>(second);
  if (two_weights) multiply_tiles<sums(0, 1), kRows, kWeights + 1, is_signed>();
  if (two_rows) load_tile<kRows + 1>(rows + kStepCols * first_rows);
  if (two_rows) multiply_tiles<sums(1, 0), kRows + 1, kWeights, is_signed>();
  if (two_rows && two_weights) multiply_tiles<sums(1, 1), kRows + 1, kWeights + 1, is_signed>();
}

template <int value>
struct Index {
  constexpr operator int() const { return value; }
};

// act(row tile, operand) for all sums that are in use.
template <bool two_rows, bool two_weights, typename Act>
inline void for_each_sum(const Act& act) {
  act(Index<0>{}, Index<0>{});
  if constexpr (two_weights) act(Index<0>{}, Index<1>{});
  if constexpr (two_rows) act(Index<1>{}, Index<0>{});
  if constexpr (two_rows && two_weights) act(Index<1>{}, Index<1>{});
}

// Adds the products of a block's rows, from their step `rows` on, with a stretch of the operands.
template <bool two_rows, bool two_weights, bool is_signed>
void add_up(const int8_t* rows, int64_t num_rows, int first_rows, const Operands& operands, const Stretch& stretch,
            Sums& out) {
  if (stretch.is_first) {
    for_each_sum<two_rows, two_weights>([](auto r, auto w) { zero_tile<sums(r, w)>(); });
  } else if (stretch.is_shared) {
    for_each_sum<two_rows, two_weights>([&](auto r, auto w) { load_tile<sums(r, w)>(out.at[r][w]); });
  }
  const auto* first = static_cast<const char*>(operands.first);
  const auto* second = static_cast<const char*>(operands.second);
  for (int64_t k = 0; k < operands.num_steps; ++k, rows += kStepCols * num_rows) {
    multiply_step<two_rows, two_weights, is_signed>(rows, first_rows, first + k * kStepBytes, second + k * kStepBytes);
  }
  if (stretch.is_last || stretch.is_shared) {
    for_each_sum<two_rows, two_weights>([&](auto r, auto w) { store_tile<sums(r, w)>(out.at[r][w]); });
  }
}

using AddUp = void (*)(const int8_t*, int64_t, int, const Operands&, const Stretch&, Sums&);

void int8_results(const Block& block, const Sums& sums, int first_rows, const Tile& tile, int t, float* out,
                  int64_t stride) {
  const __m512 scales = _mm512_loadu_ps(static_cast<const float*>(tile.scales));
  for (int r = 0; r < block.num_rows; ++r, out += stride) {
    const __m512i sum = _mm512_add_epi32(sums.of(r, first_rows, t), _mm512_set1_epi32(block.offsets[r]));
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales);
    _mm512_storeu_ps(out, _mm512_mul_ps(scaled, _mm512_set1_ps(block.scales[r])));
  }
}

void multiply_int8(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  if (!blocks[0].is_wide) {
    return avx512_kernels().multiply_int8(blocks, num_blocks, tiles, num_tiles, out, stride);
  }
  const Tiles shape(blocks[0].num_rows);
  const AddUp add_up_rows =
      shape.are_two() ? (num_tiles > 1 ? add_up<true, true, false> : add_up<true, false, false>)
                      : (num_tiles > 1 ? add_up<false, true, false> : add_up<false, false, false>);
  const int64_t num_groups = blocks[0].num_groups, num_steps = num_groups / 2;
  const uint8_t *first = tiles[0].quants, *second = tiles[num_tiles - 1].quants;
  const bool has_last = num_groups % 2 != 0;  // half a step is left, filled up with zeros
  alignas(64) uint8_t last[2][kStepBytes] = {};
  if (has_last) {
    __builtin_memcpy(last[0], first + num_steps * kStepBytes, kStepBytes / 2);
    __builtin_memcpy(last[1], second + num_steps * kStepBytes, kStepBytes / 2);
  }
  const Operands operands{first, second, num_steps};
  for (int b = 0; b < num_blocks; ++b) {
    const Block& block = blocks[b];
    ask_for_results(out, block.num_rows, num_tiles, stride);
    Sums sums;
    add_up_rows(block.quants, block.num_rows, shape.first(), operands, {true, !has_last, false}, sums);
    if (has_last) {
      add_up_rows(block.quants + num_steps * kStepCols * block.num_rows, block.num_rows, shape.first(),
                  {last[0], last[1], 1}, {false, true, false}, sums);
    }
    for (int t = 0; t < num_tiles; ++t) {
      int8_results(block, sums, shape.first(), tiles[t], t, out + t * kTileRows, stride);
    }
    out += block.num_rows * stride;
  }
}

// A stretch of int4 weights times their multipliers: their high digits and their low ones, as operands.
struct alignas(64) Digits {
  int8_t high[kStretchSteps * kStepBytes];
  int8_t low[kStretchSteps * kStepBytes];
};

constexpr int kDigitBits = 4;

// The first byte of every lane, four times.
inline __m512i fill_lanes(__m512i lanes) {
  const __m512i first = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  return _mm512_shuffle_epi8(lanes, first);
}

// One digit of a group's multipliers, in both words of every lane, and what it makes of the nibble that stands for 0.
struct DigitFactor {
  __m512i words, zeros;

  // `digit` and `zero` one number per lane.
  DigitFactor(__m512i digit, __m512i zero)
      : words(_mm512_or_si512(digit, _mm512_slli_epi32(digit, 16))),
        zeros(fill_lanes(_mm512_mullo_epi32(digit, zero))) {}

  // Nibbles in bytes, times the digit. No product passes 255, so none reaches its neighbour.
  __m512i times(__m512i nibbles) const { return _mm512_sub_epi8(_mm512_mullo_epi16(nibbles, words), zeros); }
};

// Eight lines of digits from one group of nibbles.
inline void split_group(const uint8_t* group, const int8_t* multipliers, int8_t* high, int8_t* low) {
  const __m512i signed_lanes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(multipliers)));
  const __m512i lanes = _mm512_abs_epi32(signed_lanes);
  // A negative multiplier is that of the nibbles counted from the other end: -(n - 8) = (15 - n) - 7.
  const __m512i flipped = _mm512_srai_epi32(signed_lanes, 31);
  const __m512i zero = _mm512_add_epi32(_mm512_set1_epi32(8), flipped);
  const DigitFactor high_factor(_mm512_srli_epi32(lanes, kDigitBits), zero);
  const DigitFactor low_factor(_mm512_and_si512(lanes, _mm512_set1_epi32(15)), zero);
  const __m512i mask = _mm512_set1_epi8(15);
  MIXTRAL_UNROLL
  for (int v = 0; v < 4; ++v) {
    const __m512i both = _mm512_xor_si512(_mm512_loadu_si512(group + v * 64), flipped);
    _mm_prefetch(reinterpret_cast<const char*>(group) + kNearBytes + v * 64, _MM_HINT_T0);
    const __m512i even = _mm512_and_si512(both, mask);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    _mm512_store_si512(high + v * 128, high_factor.times(even));
    _mm512_store_si512(high + v * 128 + 64, high_factor.times(odd));
    _mm512_store_si512(low + v * 128, low_factor.times(even));
    _mm512_store_si512(low + v * 128 + 64, low_factor.times(odd));
  }
}

// Returns the number of steps; half a one is filled up with zeros.
int64_t split_stretch(const uint8_t* group, const int8_t* multipliers, int64_t num_groups, Digits& digits) {
  for (int64_t i = 0; i < num_groups; ++i) {
    split_group(group + i * 256, multipliers + i * kTileRows, digits.high + i * kStepBytes / 2,
                digits.low + i * kStepBytes / 2);
  }
  if (num_groups % 2 != 0) {
    const int64_t end = num_groups * kStepBytes / 2;
    __builtin_memset(digits.high + end, 0, kStepBytes / 2);
    __builtin_memset(digits.low + end, 0, kStepBytes / 2);
  }
  return (num_groups + 1) / 2;
}

// Adds a section's sums to the totals, which are in `out`.
void add_section(const Block& block, const Sums& sums, int first_rows, const float* section_scales, bool is_first,
                 bool is_last, float* out, int64_t stride) {
  const __m512 scales = _mm512_loadu_ps(section_scales);
  for (int r = 0; r < block.num_rows; ++r, out += stride) {
    const __m512i high = _mm512_slli_epi32(sums.of(r, first_rows, 0), kDigitBits);
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(high, sums.of(r, first_rows, 1)));
    const __m512 before = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out);
    const __m512 total = _mm512_fmadd_ps(sum, scales, before);
    _mm512_storeu_ps(out, is_last ? _mm512_mul_ps(total, _mm512_set1_ps(block.scales[r])) : total);
  }
}

void int4_tile(const Tiles& shape, const Block* blocks, int num_blocks, const Tile& tile, float* out, int64_t stride) {
  const int64_t num_groups = blocks[0].num_groups, num_sections = sections_of(num_groups);
  const AddUp add_up_rows = shape.are_two() ? add_up<true, true, true> : add_up<false, true, true>;
  Sums sums[kMaxWideBlocks];
  for (int64_t s = 0; s < num_sections; ++s) {
    const SectionScales section = SectionScales::of(tile.scales, s, num_groups);
    for (int64_t i = 0; i < section.num_groups; i += 2 * kStretchSteps) {
      const int64_t left = section.num_groups - i, count = left < 2 * kStretchSteps ? left : 2 * kStretchSteps;
      const int64_t group = s * kSectionGroups + i;
      // A single block's sums stay in their registers meanwhile: nothing that is called here uses tiles.
      Digits digits;
      const int64_t num_steps =
          split_stretch(tile.quants + group * 256, section.multipliers + i * kTileRows, count, digits);
      const Operands operands{digits.high, digits.low, num_steps};
      for (int b = 0; b < num_blocks; ++b) {
        add_up_rows(blocks[b].quants + group / 2 * kStepCols * blocks[b].num_rows, blocks[b].num_rows, shape.first(),
                    operands, {i == 0, count == left, num_blocks > 1}, sums[b]);
      }
    }
    float* to = out;
    for (int b = 0; b < num_blocks; to += blocks[b].num_rows * stride, ++b) {
      add_section(blocks[b], sums[b], shape.first(), section.scales, s == 0, s + 1 == num_sections, to, stride);
    }
  }
}

void multiply_int4(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  if (!blocks[0].is_wide) {
    return avx512_kernels().multiply_int4(blocks, num_blocks, tiles, num_tiles, out, stride);
  }
  const Tiles shape(blocks[0].num_rows);
  for (int t = 0; t < num_tiles; ++t) {
    int4_tile(shape, blocks, num_blocks, tiles[t], out + t * kTileRows, stride);
  }
}

void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  if (!place.is_wide) {
    return avx512_kernels().quantize_row(kind, x, num_cols, num_groups, place);
  }
  const auto at = [&](int64_t column) {
    return place.quants + column / kStepCols * kStepCols * place.num_block_rows + kStepCols * place.row +
           column % kStepCols;
  };
  const auto put = [&](int64_t first, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at(first)), bytes); };
  const int32_t sum = quantize_columns(x, num_cols, num_groups, place.scale, put, [](int64_t, __m512i) {});
  if (num_groups % 2 != 0) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(num_groups * kGroupCols)), __m256i{});
  if (kind == Kind::int8) place.offsets[place.row] = -128 * sum;
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels kernels = {{kMostNarrowInt8Rows, kMostNarrowInt4Rows},
                                  kWideBlockRows,
                                  quantize_row,
                                  multiply_int8,
                                  multiply_int4,
                                  avx512_kernels().gate,
                                  avx512_kernels().combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
