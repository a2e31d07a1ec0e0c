// linear_int8 and linear_int4: rows are quantised, then multiplied by one matrix or several, in one parallel region.
#include "operations.h"
#include "parallel.h"
#include "products.h"
#include "row_blocks.h"
#include "tile_tasks.h"

namespace mixtral {

void multiply_rows(const LinearRows& call, const Factor* factors, int num_factors) {
  const Kernels& kernels = active_kernels();
  const Kind kind = call.kind;
  const int64_t num_groups = groups_of(call.num_cols);
  const Segment segment{0, call.num_rows, kernels.block_rows(kind, call.num_rows)};
  Scratch scratch(call.scratch);
  const PackedRows rows = PackedRows::take(scratch, kind, call.num_rows, num_groups);
  const auto matrix = [&](const Factor& factor) {
    const int64_t num_tiles = (factor.num_outputs + kTileRows - 1) / kTileRows;
    return Matrix{kind, factor.weights.quants, factor.weights.scales, num_tiles, num_groups};
  };
  const auto grid = [&](const Matrix& of) {
    return TaskGrid(segment, (of.num_tiles + 1) / 2, column_bytes(num_groups), call.num_threads);
  };
  int64_t ends[kMaxFactors];  // tasks of the factors so far
  for (int i = 0; i < num_factors; ++i) {
    ends[i] = (i > 0 ? ends[i - 1] : 0) + grid(matrix(factors[i])).num_tasks();
  }
  parallel(call.num_threads, [&](Team& team) {
    team.for_all(0, call.num_rows, 1, [&](int64_t row, int64_t) {
      rows.quantize(kernels, segment, row, call.x + row * call.num_cols, call.num_cols);
    });
    team.for_each(1, ends[num_factors - 1], 1, [&](int64_t index, int64_t) {
      int i = 0;
      while (index >= ends[i]) ++i;
      const Factor& factor = factors[i];
      const Matrix of = matrix(factor);
      const Task task = grid(of).task(index - (i > 0 ? ends[i - 1] : 0));
      run_product(kernels, of, rows, segment, task, factor.out, factor.num_outputs);
    });
  });
}

}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_linear_scratch_bytes(int64_t num_rows, int64_t num_cols,
                                                                            int32_t kind) {
  return mixtral::PackedRows::num_bytes(static_cast<mixtral::Kind>(kind), num_rows, mixtral::groups_of(num_cols));
}

// x [num_rows, num_cols] times the matrix, to out [num_rows, num_outputs].
__attribute__((visibility("default"))) void mixtral_linear(const mixtral::LinearWeights* matrix, const float* x,
                                                           float* out, void* scratch, int64_t num_rows,
                                                           int32_t num_threads) {
  const mixtral::Kind kind = static_cast<mixtral::Kind>(matrix->kind);
  const mixtral::LinearRows rows{x, scratch, num_rows, matrix->num_cols, kind, num_threads};
  const mixtral::Factor factor{matrix->weights, out, matrix->num_outputs};
  if (num_rows > 0) mixtral::multiply_rows(rows, &factor, 1);
}
}
