// products.h in plain C++: the reference of the bits, and what machines other than x86-64 run.
#include <cmath>
#include <cstring>
#include <limits>

#include "math.h"
#include "products.h"

namespace mixtral {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Magnitudes compare like their bits, with infinity and NaN above all numbers: one maximum finds all three.
uint32_t largest_magnitude(const float* x, int64_t num_cols) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < num_cols; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const uint32_t largest = largest_magnitude(x, num_cols);
  const float absmax = from_bits(largest);
  float inverse = 127.0f / absmax;
  float scale = absmax / 127.0f;
  const bool finite = largest < kInfinityBits;
  const bool usable = finite && bits_of(inverse) < kInfinityBits;
  if (!usable) scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  *place.scale = scale;
  int32_t row_sum = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    int8_t q[kGroupCols] = {};
    const int64_t first = g * kGroupCols;
    const int64_t count = num_cols - first < kGroupCols ? num_cols - first : kGroupCols;
    int32_t sum = 0;
    for (int64_t i = 0; usable && i < count; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, halves to even, as the conversions of the vector units do.
      const float shifted = x[first + i] * inverse + kExpRound;
      q[i] = static_cast<int8_t>(static_cast<int32_t>(bits_of(shifted) - kExpRoundBits));
      sum += q[i];
    }
    for (int piece = 0; piece < kGroupCols / 4; ++piece) {
      const int64_t at = (g * (kGroupCols / 4) + piece) * place.num_block_rows + place.row;
      std::memcpy(place.quants + 4 * at, q + 4 * piece, 4);
    }
    if (kind == Kind::int4) place.offsets[g * place.num_block_rows + place.row] = -8 * sum;
    row_sum += sum;
  }
  if (kind == Kind::int8) place.offsets[place.row] = -128 * row_sum;
}

// Adds the products of `count` lines of 4 columns to the sums of one row.
template <typename Line>
void add_lines(const int8_t* quants, int64_t stride, int64_t count, int32_t (&sums)[kTileRows], Line&& line) {
  uint8_t weights[4 * kTileRows];
  for (int64_t c = 0; c < count; ++c) {
    line(c, weights);
    const int8_t* a = quants + c * stride;
    for (int o = 0; o < kTileRows; ++o) {
      const uint8_t* w = weights + 4 * o;
      sums[o] += w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
    }
  }
}

void int8_tile(const Block& block, const Tile& tile, float* out, int64_t stride) {
  const auto* scales = static_cast<const float*>(tile.scales);
  for (int r = 0; r < block.num_rows; ++r) {
    int32_t sums[kTileRows];
    for (int32_t& sum : sums) sum = block.offsets[r];
    add_lines(block.quants + 4 * r, 4 * block.num_rows, block.num_groups * 8, sums,
              [&](int64_t c, uint8_t* line) { std::memcpy(line, tile.quants + c * 64, 64); });
    for (int o = 0; o < kTileRows; ++o) {
      out[r * stride + o] = static_cast<float>(sums[o]) * scales[o] * block.scales[r];
    }
  }
}

// Adds multiplier * (sum of group `g`) of row `r` to the sums of its section.
void add_group(const Block& block, int r, const uint8_t* group, int64_t g, const int8_t* multipliers,
               int32_t (&section_sums)[kTileRows]) {
  int32_t sums[kTileRows];
  for (int32_t& sum : sums) sum = block.offsets[g * block.num_rows + r];
  add_lines(block.quants + (g * 8 * block.num_rows + r) * 4, 4 * block.num_rows, 8, sums,
            [&](int64_t c, uint8_t* line) {
              const int shift = c % 2 ? 4 : 0;
              for (int i = 0; i < 64; ++i) line[i] = (group[c / 2 * 64 + i] >> shift) & 15;
            });
  for (int o = 0; o < kTileRows; ++o) section_sums[o] += multipliers[o] * sums[o];
}

void int4_tile(const Block& block, const Tile& tile, float* out, int64_t stride) {
  for (int r = 0; r < block.num_rows; ++r) {
    float totals[kTileRows] = {};
    for (int64_t s = 0; s < sections_of(block.num_groups); ++s) {
      const SectionScales section = SectionScales::of(tile.scales, s, block.num_groups);
      int32_t sums[kTileRows] = {};
      for (int64_t i = 0; i < section.num_groups; ++i) {
        const int64_t g = s * kSectionGroups + i;
        add_group(block, r, tile.quants + g * 256, g, section.multipliers + i * kTileRows, sums);
      }
      for (int o = 0; o < kTileRows; ++o) {
        totals[o] = std::fma(static_cast<float>(sums[o]), section.scales[o], totals[o]);
      }
    }
    for (int o = 0; o < kTileRows; ++o) out[r * stride + o] = totals[o] * block.scales[r];
  }
}

template <void (*tile_kernel)(const Block&, const Tile&, float*, int64_t)>
void multiply(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  for (int b = 0; b < num_blocks; out += blocks[b].num_rows * stride, ++b) {
    for (int t = 0; t < num_tiles; ++t) tile_kernel(blocks[b], tiles[t], out + t * kTileRows, stride);
  }
}

void gate(const float* both, int num_rows, float* out, int64_t stride) {
  for (int r = 0; r < num_rows; ++r) {
    const float* row = both + r * 2 * kTileRows;
    for (int o = 0; o < kTileRows; ++o) out[r * stride + o] = silu_f32(row[o]) * row[kTileRows + o];
  }
}

void combine(const float* const* parts, const float* weights, int64_t k, int64_t num_cols, float* out) {
  for (int64_t c = 0; c < num_cols; ++c) {
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum = std::fma(weights[i], parts[i][c], sum);
    out[c] = sum;
  }
}

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = {
      {kAllNarrow, kAllNarrow}, 0, quantize_row, multiply<int8_tile>, multiply<int4_tile>, gate, combine};
  return kernels;
}

}  // namespace mixtral
