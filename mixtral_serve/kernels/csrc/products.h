// Products of quantised rows with tiles of quantised weights: the pieces every instruction set brings, and the packed
// rows they read. linear.cpp and experts.cpp say in which order the pieces are called.
//
// Numerics, the same for every implementation, bit for bit:
//   rows     symmetric 8 bits, each row on its own: scale = absmax / 127, q = round_to_even(x * (127 / absmax)).
//            A row of zeros (or of numbers so small that 127 / absmax is not finite) has q = 0 and scale 0; a row
//            with NaN or infinity has q = 0 and scale NaN: all its results are NaN, and none of its neighbours'.
//   int8     y = (float(sum over all columns) * weight_scale) * row_scale
//   int4     acc = fma(float(sum over a section of multiplier * (sum of the group)), section_scale, acc), sections
//            ascending from acc = 0; y = acc * row_scale
// Sums are 32-bit integers and exact, in whatever order they are made. Weights are stored with an offset (128, 8): the
// sum starts at -offset * (sum of the row's integers), which is made once when the row is quantised.
//
// Outputs lie in the lanes of a vector, so that no sum is ever split; a block of rows shares every weight that was
// loaded.
//
// Rejected: columns in the lanes (one horizontal sum per output and row); int4 unpacked to int8 in memory (twice the
// bytes).
#pragma once

#include <cstdint>

namespace mixtral {

enum class Kind : int { int8 = 0, int4 = 1 };

constexpr int kTileRows = 16;
constexpr int kGroupCols = 32;
constexpr int64_t kSectionGroups = 128;

inline int64_t groups_of(int64_t num_cols) { return (num_cols + kGroupCols - 1) / kGroupCols; }
inline int64_t sections_of(int64_t num_groups) { return (num_groups + kSectionGroups - 1) / kSectionGroups; }

// Bytes of the int4 scales of a tile; see SectionScales.
inline int64_t int4_scale_bytes(int64_t num_groups) {
  return (sections_of(num_groups) * static_cast<int64_t>(sizeof(float)) + num_groups) * kTileRows;
}

// The int4 scales of one section of a tile: fp32 [16], then the multipliers of its groups, int8 [groups][16].
struct SectionScales {
  const float* scales;
  const int8_t* multipliers;
  int64_t num_groups;

  // Of section `section` in a tile's scales.
  static SectionScales of(const void* tile_scales, int64_t section, int64_t num_groups) {
    constexpr int64_t kBytes = kTileRows * (static_cast<int64_t>(sizeof(float)) + kSectionGroups);
    const char* begin = static_cast<const char*>(tile_scales) + section * kBytes;
    const int64_t left = num_groups - section * kSectionGroups;
    return {reinterpret_cast<const float*>(begin),
            reinterpret_cast<const int8_t*>(begin + kTileRows * static_cast<int64_t>(sizeof(float))),
            left < kSectionGroups ? left : kSectionGroups};
  }
};

// Rows multiplied at a time. Narrow blocks: with 12, a tile's sums (int4: of the group and of the section) fill 24 of
// the 32 registers of AVX-512; more would not help int8 either, which reaches the peak with 8. Wide blocks have more
// rows, and are laid out as an instruction set wants many rows.
constexpr int kNarrowBlockRows = 12;
// Rows that meet a tile before the next is read, at most: their results have room on the stack.
constexpr int kMaxRunRows = 256;
constexpr int kMaxRunBlocks = kMaxRunRows / kNarrowBlockRows;

// From here to ahead_of(), products_avx512.cpp and products_amx.cpp depend on each field's place: see avx512_target.h
// before changing one.

// Quantised rows, interleaved so that what one instruction reads lies together.
struct Block {
  const int8_t* quants;    // narrow: [columns / 4][num_rows][4]
                           // wide: [columns / 64][num_rows][64], padded with zeros
                           // int8: behind them, excess_offset() says where, is room for what rows_avx2.h sets apart
  const int32_t* offsets;  // what sums start at: int8 [num_rows], int4 [groups][num_rows] (not in wide blocks)
  const float* scales;     // [num_rows]
  int num_rows;
  bool is_wide;
  int64_t num_groups;  // columns / 32, padded columns included
};

// Of a row's columns, bytes: whole pieces of 64, as wide blocks have them.
inline int64_t column_bytes(int64_t num_groups) { return (num_groups + 1) / 2 * 64; }

// Room for what is set apart of an int8 row, bytes: 8 for every four columns, and an end.
inline int64_t excess_bytes(int64_t num_groups) { return (num_groups + 1) * 64; }

// From a block's first column to the excess of row `row`, bytes.
inline int64_t excess_offset(int64_t num_rows, int64_t num_groups, int64_t row) {
  return num_rows * column_bytes(num_groups) + row * excess_bytes(num_groups);
}

// Where one row of a block is written to.
struct RowPlace {
  int8_t* quants;    // of the block
  int32_t* offsets;  // of the block
  float* scale;      // of the row
  int64_t row;       // in the block
  int64_t num_block_rows;
  bool is_wide;
};

// Sixteen rows of a matrix, and what will be read after them.
struct Tile {
  const uint8_t* quants;
  const void* scales;  // int8: float [16]; int4: SectionScales
  const uint8_t* next_quants;
  const void* next_scales;
};

// A tile that several blocks meet comes from memory during the first visit only; asking for the next one a share at a
// time, visit by visit, keeps memory busy during all of them.
struct Visit {
  int64_t index;  // 0 .. count - 1
  int64_t count;
};

// The addresses to ask for while a tile is read: where, and how far they move with every line of 64 bytes. Asking for
// what lies outside the matrix does no harm.
struct Ahead {
  const char* quants;
  const char* scales;  // int4: moves a step with every four groups
  int64_t step;
};

// About what arrives while a thread waits for one line of memory.
constexpr int64_t kNearBytes = 2048;

inline Ahead ahead_of(const Tile& tile, const Visit& visit, int64_t num_lines) {
  if (visit.count == 1) {
    return {reinterpret_cast<const char*>(tile.quants) + kNearBytes,
            static_cast<const char*>(tile.scales) + kNearBytes / 16, 64};
  }
  const int64_t count = visit.count < 64 ? visit.count : 64, step = 64 / count;
  const int64_t first = visit.index % count * num_lines * step;
  return {reinterpret_cast<const char*>(tile.next_quants) + first,
          static_cast<const char*>(tile.next_scales) + first / 16, step};
}

// out[row * stride + 16 * t + o] for each row of neighbouring blocks, which all have the same width, and output o of
// each of 1 or 2 tiles.
using Multiply = void (*)(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out,
                          int64_t stride);

struct Kernels {
  // More rows than this that meet one matrix are cut into wide blocks, of so many rows at most; by kind.
  int64_t most_narrow_rows[2];
  int64_t wide_block_rows;
  // Quantises x [num_cols], padded with zeros to num_groups * 32 (in wide blocks: to a multiple of 64).
  void (*quantize_row)(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place);
  Multiply multiply_int8;
  Multiply multiply_int4;
  // out[row * stride + o] = silu(both[row][o]) * both[row][16 + o], o < 16.
  void (*gate)(const float* both, int num_rows, float* out, int64_t stride);
  // out[c] = weights[k - 1] * parts[k - 1][c] fused onto ... onto weights[0] * parts[0][c], c < num_cols.
  void (*combine)(const float* const* parts, const float* weights, int64_t k, int64_t num_cols, float* out);

  Multiply multiply(Kind kind) const { return kind == Kind::int4 ? multiply_int4 : multiply_int8; }
  int64_t block_rows(Kind kind, int64_t num_rows) const {
    return num_rows > most_narrow_rows[static_cast<int>(kind)] ? wide_block_rows : kNarrowBlockRows;
  }
};

// For instruction sets without wide blocks.
constexpr int64_t kAllNarrow = INT64_MAX;

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
#endif

// Those of the instruction set in use.
const Kernels& active_kernels();

}  // namespace mixtral
