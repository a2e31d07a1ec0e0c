// Attention over paged keys and values: what one call consists of, and the kernel that each instruction set offers.
//
// The law: a row's result is a function of its query, of the keys and values it may see and of their absolute
// positions.
//   * A score is one chain of fused multiply-adds over the dimensions, ascending.
//   * Keys are taken in tiles of kTileKeys, which begin at multiples of it. Within a split of kSplitKeys, which begins
//     at a multiple of it as well, each tile updates the largest score, sixteen partial sums (one per position
//     modulo 16) and the weighted values, key after key.
//   * The splits of a row are combined in ascending order by merge(), whoever computed them.
// A tile or split in which a row sees nothing leaves the row as it is. So it makes no difference whether a row is
// computed alone, beside others of a prefill, by one thread or by one thread per split.
//
// Invariant: a slot that a row may not see never takes part in an addition or a multiplication that reaches its result.
#pragma once

#include <cstdint>

namespace mixtral {

constexpr int kLanes = 16;
constexpr int kTileKeys = 32;
constexpr int kSplitKeys = 512;
constexpr int kMaxPieceRows = 64;

enum class Storage : int64_t { fp32 = 0, bf16 = 1, int8 = 2 };

// Mirrored field by field by AttentionCall in native_attention.py. Strides are in elements, innermost ones are 1.
struct AttentionCall {
  const float* query;  // [rows, query heads, head_dim]
  const float* key;    // [rows, kv heads, head_dim]
  const float* value;  // [rows, kv heads, head_dim]
  float* out;          // [rows, query heads, head_dim], dense
  int64_t query_row_stride, query_head_stride;
  int64_t key_row_stride, key_head_stride;
  int64_t value_row_stride, value_head_stride;
  int64_t num_rows, num_query_heads, num_kv_heads, head_dim;
  void* keys;           // one layer: [blocks, kv heads, head_dim, block_size]
  void* values;         // one layer: [blocks, kv heads, block_size, head_dim]
  float* key_scales;    // one layer: [blocks, kv heads, block_size]; int8 only
  float* value_scales;  // likewise
  Storage storage;
  int64_t num_blocks, block_size;
  const int64_t* slots;   // [rows]: block * block_size + offset
  const int64_t* tables;  // [table entries]: block ids
  int64_t num_table_entries;
  const int64_t* pieces;  // [pieces, kPieceFields]
  int64_t num_pieces;
  const int64_t* merges;  // [merges, kMergeFields]
  int64_t num_merges;
  int64_t window;  // positions a row sees, itself included; 0: all
  double scaling;
  float* workspace;  // [threads, workspace_floats(head_dim)]
  float* partials;   // [partial slots, query heads, partial_floats(head_dim)]
  int64_t num_partials;
  int64_t num_threads;  // at most
};

// Query rows that share keys: of one slice and one key head, `num_rows` rows counted position by position and within
// a position query head by query head. `split` is -1 for all that they see (the result goes to `out`), or one
// split of a slice of one token, whose result goes to the slot `partial`.
struct Piece {
  int64_t first_slice_row;  // row of the slice's first token
  int64_t start;            // its position
  int64_t table;            // the block of position p is tables[table + p / block_size]; may be negative
  int64_t first_row, num_rows;
  int64_t split, partial;
};
constexpr int kPieceFields = 7;

// A slice of one token whose splits were computed apart: `num_partials` slots from `first_partial`, ascending.
struct Merge {
  int64_t row, first_partial, num_partials;
};
constexpr int kMergeFields = 3;

// The functions are static, each unit has a copy of its own: the linker must not choose one instruction set's for all.

static constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A result that is not normalised yet: weighted values, then the largest score and the sum of weights.
static constexpr int64_t partial_floats(int64_t head_dim) { return round_up(head_dim, kLanes) + kLanes; }

// Of one thread: a tile, queries, weights, two results per row, partial sums, two rows of scales.
static constexpr int64_t workspace_floats(int64_t head_dim) {
  const int64_t row = round_up(head_dim, kLanes) + kTileKeys + 2 * partial_floats(head_dim) + kLanes;
  return round_up(head_dim, kLanes) * kTileKeys + kMaxPieceRows * row + 2 * kTileKeys;
}

// Keys and values of rows [first, end) to their slots. Plain C++: it is bound by memory.
void store_rows(const AttentionCall& call, int64_t first, int64_t end);

struct AttentionKernel {
  // One piece for one key head, with one thread's workspace.
  void (*attend)(const AttentionCall& call, const Piece& piece, int64_t kv_head, float* workspace);
  // One slice for one query head.
  void (*merge)(const AttentionCall& call, const Merge& merge, int64_t query_head, float* workspace);
};

extern const AttentionKernel kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernel kAttentionAvx2;
#endif

}  // namespace mixtral
