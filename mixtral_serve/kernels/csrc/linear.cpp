// linear_int8 and linear_int4: rows are quantised, then multiplied, in one parallel region.
#include "parallel.h"
#include "products.h"
#include "row_blocks.h"
#include "tile_tasks.h"

namespace mixtral {
namespace {

// Field by field what the Python side fills in.
struct LinearCall {
  const float* x;         // [num_rows, num_cols]
  const uint8_t* quants;  // [num_tiles, ...], see formats.py
  const void* scales;
  float* out;     // [num_rows, num_outputs]
  void* scratch;  // mixtral_linear_scratch_bytes(num_rows, num_groups)
  int64_t num_rows;
  int64_t num_cols;
  int64_t num_groups;
  int64_t num_outputs;
  int32_t kind;
  int32_t num_threads;
};

void run(const LinearCall& call) {
  const Kernels& kernels = active_kernels();
  const Kind kind = static_cast<Kind>(call.kind);
  const Matrix matrix{kind, call.quants, call.scales, (call.num_outputs + kTileRows - 1) / kTileRows, call.num_groups};
  const Segment segment{0, call.num_rows};
  const PackedRows rows = Scratch(call.scratch).take_rows(kind, call.num_rows, call.num_groups);
  const TaskGrid grid(segment, (matrix.num_tiles + 1) / 2, call.num_groups, call.num_threads);
  parallel(call.num_threads, [&](Team& team) {
    team.for_each(0, call.num_rows, 1, [&](int64_t row, int64_t) {
      kernels.quantize_row(kind, call.x + row * call.num_cols, call.num_cols, call.num_groups,
                           rows.place(segment, row));
    });
    team.barrier();
    team.for_each(1, grid.num_tasks(), 1, [&](int64_t index, int64_t) {
      run_product(kernels, matrix, rows, segment, grid.task(index), call.out, call.num_outputs);
    });
  });
}

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_linear_scratch_bytes(int64_t num_rows, int64_t num_groups) {
  return mixtral::PackedRows::num_bytes(num_rows, num_groups);
}

__attribute__((visibility("default"))) void mixtral_linear(const mixtral::LinearCall* call) {
  if (call->num_rows > 0) mixtral::run(*call);
}
}
