// Cutting the product of a segment of rows with a matrix into tasks, and carrying one out.
//
// A task is a run of tiles times a part of the segment's blocks: a few hundred rows. Within a task every two tiles meet
// all blocks before the next two are read, so weights come from memory once per part and stay in the second-level cache
// meanwhile; the packed rows of a part stream from the cache behind it. Tasks that differ in the part only are
// neighbours: threads that read the same weights do so at the same time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "products.h"
#include "row_blocks.h"

namespace mixtral {

// One matrix in the packed layout of formats.py.
struct Matrix {
  Kind kind;
  const uint8_t* quants;
  const void* scales;
  int64_t num_tiles;
  int64_t num_groups;

  int64_t tile_bytes() const { return num_groups * (kind == Kind::int4 ? 256 : 512); }
  int64_t scale_bytes() const { return kind == Kind::int4 ? int4_scale_bytes(num_groups) : kTileRows * 4; }

  // Tile `index`, after which comes tile `index + distance`.
  Tile tile(int64_t index, int64_t distance) const {
    const uint8_t* tile_quants = quants + index * tile_bytes();
    const char* tile_scales = static_cast<const char*>(scales) + index * scale_bytes();
    const uint8_t* next_quants = tile_quants + distance * tile_bytes();
    return {tile_quants, tile_scales, next_quants, tile_scales + distance * scale_bytes()};
  }

  // Matrix `index` of several that lie behind each other.
  Matrix at(int64_t index) const {
    return {kind, quants + index * num_tiles * tile_bytes(),
            static_cast<const char*>(scales) + index * num_tiles * scale_bytes(), num_tiles, num_groups};
  }
};

// What a task covers: units (pairs of tiles) and blocks of a segment.
struct Task {
  int64_t first_unit, end_unit;
  int64_t first_block, end_block;
};

class TaskGrid {
 public:
  // Packed rows of one part, at most: a share of the last-level cache.
  static constexpr int64_t kPartBytes = int64_t{4} << 20;

  TaskGrid(const Segment& segment, int64_t num_units, int64_t bytes_per_row, int num_threads)
      : num_units_(num_units), num_blocks_(segment.num_blocks()) {
    const int64_t part_rows = std::min<int64_t>(kPartBytes / bytes_per_row, kMaxRunRows);
    const int64_t most_blocks = std::max<int64_t>(1, part_rows / segment.max_block_rows);
    num_parts_ = (num_blocks_ + most_blocks - 1) / most_blocks;
    blocks_per_part_ = (num_blocks_ + num_parts_ - 1) / num_parts_;
    // Runs of neighbouring tiles read long stretches; many tasks per thread end at nearly the same time.
    units_per_run_ = std::clamp<int64_t>(num_units / (num_threads * 16), 1, 8);
    num_runs_ = (num_units + units_per_run_ - 1) / units_per_run_;
  }

  int64_t num_tasks() const { return num_runs_ * num_parts_; }

  Task task(int64_t index) const {
    const int64_t run = index / num_parts_, part = index % num_parts_;
    return {run * units_per_run_, std::min((run + 1) * units_per_run_, num_units_), part * blocks_per_part_,
            std::min((part + 1) * blocks_per_part_, num_blocks_)};
  }

 private:
  int64_t num_units_, num_blocks_;
  int64_t units_per_run_, blocks_per_part_;
  int64_t num_runs_, num_parts_;
};

// The blocks of a task: what `Multiply` takes.
class Run {
 public:
  Run(const PackedRows& rows, const Segment& segment, const Task& task)
      : num_blocks_(static_cast<int>(task.end_block - task.first_block)),
        first_row_(segment.first_row + segment.block_start(task.first_block)),
        num_rows_(segment.first_row + segment.block_start(task.end_block) - first_row_) {
    for (int b = 0; b < num_blocks_; ++b) blocks_[b] = rows.block(segment, task.first_block + b);
  }

  int64_t first_row() const { return first_row_; }
  int64_t num_rows() const { return num_rows_; }

  // out[row][o] for all rows from the first and the outputs of the tiles.
  void multiply(const Kernels& kernels, Kind kind, const Tile* tiles, int num_tiles, float* out, int64_t stride) const {
    kernels.multiply(kind)(blocks_, num_blocks_, tiles, num_tiles, out, stride);
  }

 private:
  int num_blocks_;
  int64_t first_row_, num_rows_;
  Block blocks_[kMaxRunBlocks];
};

// Room for a run's results of two tiles.
using TwoTiles = float[kMaxRunRows * 2 * kTileRows];

// out[row][o] for the task's blocks and for the outputs of its tiles, o < num_outputs; unit u is tiles 2u and 2u + 1.
inline void run_product(const Kernels& kernels, const Matrix& matrix, const PackedRows& rows, const Segment& segment,
                        const Task& task, float* out, int64_t num_outputs) {
  const Run run(rows, segment, task);
  for (int64_t unit = task.first_unit; unit < task.end_unit; ++unit) {
    const int64_t first_tile = 2 * unit;
    const int num_tiles = first_tile + 1 < matrix.num_tiles ? 2 : 1;
    const Tile tiles[2] = {matrix.tile(first_tile, 2), matrix.tile(first_tile + num_tiles - 1, 2)};
    const int64_t width = std::min<int64_t>(num_tiles * kTileRows, num_outputs - first_tile * kTileRows);
    float* first = out + run.first_row() * num_outputs + first_tile * kTileRows;
    if (width == num_tiles * kTileRows) {
      run.multiply(kernels, matrix.kind, tiles, num_tiles, first, num_outputs);
      continue;
    }
    TwoTiles whole;  // the last tile is padded, the output is not
    run.multiply(kernels, matrix.kind, tiles, num_tiles, whole, 2 * kTileRows);
    for (int64_t r = 0; r < run.num_rows(); ++r) {
      std::memcpy(first + r * num_outputs, whole + r * 2 * kTileRows, sizeof(float) * width);
    }
  }
}

}  // namespace mixtral
