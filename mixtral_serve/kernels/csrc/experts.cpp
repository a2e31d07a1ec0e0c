// experts_int8 and experts_int4: all experts of a layer in one parallel region of five phases.
//
//   1. the row of every slot is quantised, into the blocks of its expert
//   2. gate and up of 16 intermediate columns at a time, by one thread: silu(gate) * up
//   3. every slot's intermediate row is quantised by its own largest magnitude
//   4. down
//   5. each row's slots are weighted and added, in ascending expert id
//
// A task of phases 2 and 4 belongs to one expert; experts nobody chose have none, and their weights are not read.
#include "operations.h"
#include "parallel.h"
#include "products.h"
#include "routing.h"
#include "row_blocks.h"
#include "tile_tasks.h"

namespace mixtral {
namespace {

int64_t tiles_of(int64_t num_rows) { return (num_rows + kTileRows - 1) / kTileRows; }

// Tasks of all experts' segments in a row: which expert's a task is, and which part of its product.
class ExpertTasks {
 public:
  // `starts` [num_experts + 1] is filled in.
  ExpertTasks(const Routing& routing, const PackedRows& rows, int64_t num_units, int num_threads, int64_t* starts)
      : routing_(routing), num_units_(num_units), bytes_per_row_(column_bytes(rows.num_groups)),
        num_threads_(num_threads), starts_(starts) {
    starts[0] = 0;
    for (int64_t e = 0; e < routing.num_experts; ++e) {
      starts[e + 1] = starts[e] + (routing.segments[e].num_rows > 0 ? grid(e).num_tasks() : 0);
    }
  }

  int64_t num_tasks() const { return starts_[routing_.num_experts]; }

  Task find(int64_t index, int64_t& expert) const {
    for (expert = 0; index >= starts_[expert + 1];) ++expert;
    return grid(expert).task(index - starts_[expert]);
  }

 private:
  TaskGrid grid(int64_t expert) const {
    return TaskGrid(routing_.segments[expert], num_units_, bytes_per_row_, num_threads_);
  }

  const Routing& routing_;
  int64_t num_units_, bytes_per_row_;
  int num_threads_;
  int64_t* starts_;
};

class Experts {
 public:
  explicit Experts(const ExpertsCall& call)
      : call_(call),
        kernels_(active_kernels()),
        kind_(static_cast<Kind>(call.kind)),
        inner_cols_(call.num_inner_tiles * kTileRows),
        w1_{kind_, call.w1.quants, call.w1.scales, call.num_inner_tiles, groups_of(call.num_cols)},
        w2_{kind_, call.w2.quants, call.w2.scales, tiles_of(call.num_cols), groups_of(inner_cols_)},
        w3_{kind_, call.w3.quants, call.w3.scales, call.num_inner_tiles, groups_of(call.num_cols)} {
    Scratch scratch(call.scratch);
    const int64_t slots = call.num_rows * call.k;
    routing_ = Routing::take(scratch, call.num_rows, call.num_experts, call.k);
    rows_ = PackedRows::take(scratch, kind_, slots, w1_.num_groups);
    inner_rows_ = PackedRows::take(scratch, kind_, slots, w2_.num_groups);
    inner_ = scratch.take<float>(slots * inner_cols_);
    down_ = scratch.take<float>(slots * call.num_cols);
    up_starts_ = scratch.take<int64_t>(call.num_experts + 1);
    down_starts_ = scratch.take<int64_t>(call.num_experts + 1);
    routing_.sort(call.ids, call.weights, call.num_rows, kernels_, kind_);
  }

  void run() {
    const ExpertTasks up_tasks(routing_, rows_, w1_.num_tiles, call_.num_threads, up_starts_);
    const ExpertTasks down_tasks(routing_, inner_rows_, (w2_.num_tiles + 1) / 2, call_.num_threads, down_starts_);
    const int64_t slots = call_.num_rows * call_.k;
    parallel(call_.num_threads, [&](Team& team) {
      team.for_all(0, slots, 1, [&](int64_t slot, int64_t) {
        quantize(rows_, slot, call_.hidden + routing_.row_of_slot[slot] * call_.num_cols, call_.num_cols);
      });
      team.for_all(1, up_tasks.num_tasks(), 1, [&](int64_t index, int64_t) { gate_and_up(up_tasks, index); });
      team.for_all(2, slots, 1, [&](int64_t slot, int64_t) {
        quantize(inner_rows_, slot, inner_ + slot * inner_cols_, inner_cols_);
      });
      team.for_all(3, down_tasks.num_tasks(), 1, [&](int64_t index, int64_t) { down(down_tasks, index); });
      team.for_each(4, call_.num_rows, 1, [&](int64_t row, int64_t) { add_up(row); });
    });
  }

 private:
  void quantize(const PackedRows& rows, int64_t slot, const float* x, int64_t num_cols) const {
    const Segment& segment = routing_.segments[routing_.expert_of_slot[slot]];
    rows.quantize(kernels_, segment, slot - segment.first_row, x, num_cols);
  }

  void gate_and_up(const ExpertTasks& tasks, int64_t index) const {
    int64_t expert;
    const Task task = tasks.find(index, expert);
    const Matrix w1 = w1_.at(expert), w3 = w3_.at(expert);
    const Run run(rows_, routing_.segments[expert], task);
    for (int64_t tile = task.first_unit; tile < task.end_unit; ++tile) {
      const Tile tiles[2] = {w1.tile(tile, 1), w3.tile(tile, 1)};
      TwoTiles both;
      run.multiply(kernels_, kind_, tiles, 2, both, 2 * kTileRows);
      kernels_.gate(both, static_cast<int>(run.num_rows()), inner_ + run.first_row() * inner_cols_ + tile * kTileRows,
                    inner_cols_);
    }
  }

  void down(const ExpertTasks& tasks, int64_t index) const {
    int64_t expert;
    const Task task = tasks.find(index, expert);
    run_product(kernels_, w2_.at(expert), inner_rows_, routing_.segments[expert], task, down_, call_.num_cols);
  }

  void add_up(int64_t row) const {
    const int32_t* slots = routing_.slots_of_row + row * call_.k;
    const float* parts[kMaxChosen];
    for (int64_t i = 0; i < call_.k; ++i) parts[i] = down_ + slots[i] * call_.num_cols;
    kernels_.combine(parts, routing_.weights_of_row + row * call_.k, call_.k, call_.num_cols,
                     call_.out + row * call_.num_cols);
  }

 public:
  static constexpr int64_t kMaxChosen = 64;

  static int64_t scratch_bytes(int64_t num_rows, int64_t num_cols, int64_t k, int64_t num_experts,
                               int64_t num_inner_tiles, Kind kind) {
    const int64_t slots = num_rows * k, inner_cols = num_inner_tiles * kTileRows;
    const int64_t routing = slots * 16 + num_experts * static_cast<int64_t>(sizeof(Segment)) + 5 * 64;
    const int64_t tasks = 2 * (num_experts + 1) * 8 + 2 * 64;
    return routing + tasks + PackedRows::num_bytes(kind, slots, groups_of(num_cols)) +
           PackedRows::num_bytes(kind, slots, groups_of(inner_cols)) + slots * (inner_cols + num_cols) * 4 + 2 * 64;
  }

 private:
  const ExpertsCall& call_;
  const Kernels& kernels_;
  const Kind kind_;
  const int64_t inner_cols_;
  const Matrix w1_, w2_, w3_;
  Routing routing_;
  PackedRows rows_;        // the hidden state of every slot
  PackedRows inner_rows_;  // its intermediate activations
  float* inner_;           // [slots][inner_cols]
  float* down_;            // [slots][num_cols]
  int64_t* up_starts_;     // of ExpertTasks
  int64_t* down_starts_;
};

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_experts_scratch_bytes(int64_t num_rows, int64_t num_cols,
                                                                             int64_t k, int64_t num_experts,
                                                                             int64_t num_inner_tiles, int32_t kind) {
  return mixtral::Experts::scratch_bytes(num_rows, num_cols, k, num_experts, num_inner_tiles,
                                         static_cast<mixtral::Kind>(kind));
}

// 0; or, with nothing written, 1 if an id names no expert and 2 if there are too many per row.
__attribute__((visibility("default"))) int mixtral_experts(const mixtral::ExpertsCall* call) {
  if (call->k > mixtral::Experts::kMaxChosen) return 2;
  if (!mixtral::ids_are_valid(call->ids, call->num_rows * call->k, call->num_experts)) return 1;
  if (call->num_rows > 0) mixtral::Experts(*call).run();
  return 0;
}
}
