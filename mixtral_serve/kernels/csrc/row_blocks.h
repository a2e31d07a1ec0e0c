// Rows that meet the same weights, cut into blocks; and the packed rows themselves.
//
// A segment is a run of rows that meet one matrix: all rows of a linear, or the rows of one expert. It is cut into the
// fewest blocks possible, of nearly equal size: two blocks of 8 unpack as much as 12 + 4, and the larger one is done
// sooner.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "scratch.h"

namespace mixtral {

struct Segment {
  int64_t first_row;
  int64_t num_rows;
  int64_t max_block_rows;

  bool is_wide() const { return max_block_rows > kNarrowBlockRows; }

  int64_t num_blocks() const { return (num_rows + max_block_rows - 1) / max_block_rows; }

  // First row of block `index`, counted from the segment's first; that of index num_blocks() is num_rows.
  int64_t block_start(int64_t index) const {
    return index * (num_rows / num_blocks()) + std::min(index, num_rows % num_blocks());
  }

  int64_t block_of(int64_t row) const {
    const int64_t size = num_rows / num_blocks(), larger = num_rows % num_blocks();
    return row < larger * (size + 1) ? row / (size + 1) : larger + (row - larger * (size + 1)) / size;
  }
};

// Memory of quantised rows: each has the same share of it, whatever block it is in, and whatever the instruction set.
struct PackedRows {
  Kind kind;
  int64_t num_groups;
  int8_t* quants;    // [rows][row_bytes()]
  int32_t* offsets;  // [rows][num_offsets()]
  float* scales;     // [rows]

  static PackedRows take(Scratch& scratch, Kind kind, int64_t num_rows, int64_t num_groups) {
    PackedRows rows{kind, num_groups, nullptr, nullptr, nullptr};
    rows.quants = scratch.take<int8_t>(num_rows * rows.row_bytes());
    rows.offsets = scratch.take<int32_t>(num_rows * rows.num_offsets());
    rows.scales = scratch.take<float>(num_rows);
    return rows;
  }

  int64_t num_offsets() const { return kind == Kind::int4 ? num_groups : 1; }

  int64_t row_bytes() const { return column_bytes(num_groups) + (kind == Kind::int8 ? excess_bytes(num_groups) : 0); }

  static int64_t num_bytes(Kind kind, int64_t num_rows, int64_t num_groups) {
    Scratch from_nothing(nullptr);
    take(from_nothing, kind, num_rows, num_groups);
    return from_nothing.take<char>(0) - static_cast<char*>(nullptr);
  }

  Block block(const Segment& segment, int64_t index) const {
    const int64_t start = segment.block_start(index), row = segment.first_row + start;
    return {quants + row * row_bytes(), offsets + row * num_offsets(), scales + row,
            static_cast<int>(segment.block_start(index + 1) - start), segment.is_wide(), num_groups};
  }

  RowPlace place(const Segment& segment, int64_t row_of_segment) const {
    const int64_t index = segment.block_of(row_of_segment), start = segment.block_start(index);
    const int64_t first = segment.first_row + start, within = row_of_segment - start;
    return {quants + first * row_bytes(), offsets + first * num_offsets(), scales + first + within, within,
            segment.block_start(index + 1) - start, segment.is_wide()};
  }

  // Quantises row `row` of a segment.
  void quantize(const Kernels& kernels, const Segment& segment, int64_t row, const float* x, int64_t num_cols) const {
    kernels.quantize_row(kind, x, num_cols, num_groups, place(segment, row));
  }
};

}  // namespace mixtral
