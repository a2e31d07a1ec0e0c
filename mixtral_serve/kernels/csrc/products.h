// Products of quantised rows with tiles of quantised weights: the pieces every instruction set brings, and the packed
// rows they read. linear.cpp and experts.cpp say in which order the pieces are called.
//
// Numerics, the same for every implementation, bit for bit:
//   rows     symmetric 8 bits, each row on its own: scale = absmax / 127, q = round_to_even(x * (127 / absmax)).
//            A row of zeros (or of numbers so small that 127 / absmax is not finite) has q = 0 and scale 0; a row
//            with NaN or infinity has q = 0 and scale NaN: all its results are NaN, and none of its neighbours'.
//   int8     y = (float(sum over all columns) * weight_scale) * row_scale
//   int4     acc = fma(float(sum of the group), group_scale, acc), groups ascending from acc = 0; y = acc * row_scale
// Sums are 32-bit integers and exact. Weights are stored with an offset (128, 8): the sum starts at -offset * (sum of
// the row's integers), which is made once when the row is quantised.
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

inline int64_t groups_of(int64_t num_cols) { return (num_cols + kGroupCols - 1) / kGroupCols; }

// Rows multiplied at a time: with 12, a tile's sums and fp32 totals (int4) fill 24 of the 32 registers of AVX-512. More
// would not help int8 either, which reaches the peak with 8.
constexpr int kMaxBlockRows = 12;

// Up to kMaxBlockRows quantised rows, interleaved so that what one line of weights meets lies together.
struct Block {
  const int8_t* quants;    // [columns / 4][num_rows][4], of Kernels::column_bytes(kind) bytes each
  const int32_t* offsets;  // -offset * sums: int8 [num_rows], int4 [groups][num_rows]
  const float* scales;     // [num_rows]
  int num_rows;
  int64_t num_groups;  // columns / 32, padded columns included
};

// Where one row of a block is written to.
struct RowPlace {
  int8_t* quants;
  int32_t* offsets;
  float* scale;
  int64_t num_block_rows;  // distance between neighbouring pieces of four columns, in pieces; and between offsets
};

// Sixteen rows of a matrix, and what will be read after them. A tile that several blocks meet comes from memory during
// the first visit only; asking for the next one a share at a time, visit by visit, keeps memory busy during all of
// them.
struct Tile {
  const uint8_t* quants;
  const void* scales;  // int8: float [16]; int4: bfloat16 [groups][16]
  const uint8_t* next_quants;
  const void* next_scales;
  int64_t visit;  // 0 .. num_visits - 1
  int64_t num_visits;
};

// The addresses to ask for while a tile is read: where, and how far they move with every line of 64 bytes. Asking for
// what lies outside the matrix does no harm.
struct Ahead {
  const char* quants;
  const char* scales;  // int4: moves half a step with every group
  int64_t step;
};

// About what arrives while a thread waits for one line of memory.
constexpr int64_t kNearBytes = 4096;

inline Ahead ahead_of(const Tile& tile, int64_t num_lines) {
  if (tile.num_visits == 1) {
    return {reinterpret_cast<const char*>(tile.quants) + kNearBytes,
            static_cast<const char*>(tile.scales) + kNearBytes / 8, 64};
  }
  const int64_t step = 64 / tile.num_visits, first = tile.visit * num_lines * step;
  return {reinterpret_cast<const char*>(tile.next_quants) + first,
          static_cast<const char*>(tile.next_scales) + first / 8, step};
}

struct Kernels {
  // Of int8 rows, and of what `multiply_int8` multiplies them with: 1, or 2 where only wider products are exact.
  int64_t int8_column_bytes;
  int64_t column_bytes(Kind kind) const { return kind == Kind::int8 ? int8_column_bytes : 1; }

  // Quantises x [num_cols], padded with zeros to num_groups * 32.
  void (*quantize_row)(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place);
  // out[row * stride + 16 * t + o] for each row of the block and output o of each of 1 or 2 tiles.
  void (*multiply_int8)(const Block& block, const Tile* tiles, int num_tiles, float* out, int64_t stride);
  void (*multiply_int4)(const Block& block, const Tile* tiles, int num_tiles, float* out, int64_t stride);
  // out[row * stride + o] = silu(both[row][o]) * both[row][16 + o], o < 16.
  void (*gate)(const float* both, int num_rows, float* out, int64_t stride);
  // out[c] = weights[k - 1] * parts[k - 1][c] fused onto ... onto weights[0] * parts[0][c], c < num_cols.
  void (*combine)(const float* const* parts, const float* weights, int64_t k, int64_t num_cols, float* out);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// Those of the instruction set in use.
const Kernels& active_kernels();

}  // namespace mixtral
