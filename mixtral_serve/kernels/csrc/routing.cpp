#include "routing.h"

namespace mixtral {

bool ids_are_valid(const int64_t* ids, int64_t count, int64_t num_experts) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts) return false;
  }
  return true;
}

Routing Routing::take(Scratch& scratch, int64_t num_rows, int64_t num_experts, int64_t k) {
  const int64_t slots = num_rows * k;
  Routing routing{num_experts, k, nullptr, nullptr, nullptr, nullptr, nullptr};
  routing.row_of_slot = scratch.take<int32_t>(slots);
  routing.expert_of_slot = scratch.take<int32_t>(slots);
  routing.slots_of_row = scratch.take<int32_t>(slots);
  routing.weights_of_row = scratch.take<float>(slots);
  routing.segments = scratch.take<Segment>(num_experts);
  return routing;
}

void Routing::sort(const int64_t* ids, const float* weights, int64_t num_rows, const Kernels& kernels,
                   Kind kind) {
  for (int64_t e = 0; e < num_experts; ++e) segments[e] = {0, 0, 0};
  for (int64_t i = 0; i < num_rows * k; ++i) ++segments[ids[i]].num_rows;
  int64_t next = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    segments[e].first_row = next;
    segments[e].max_block_rows = kernels.block_rows(kind, segments[e].num_rows);
    next += segments[e].num_rows;
    segments[e].num_rows = 0;  // counts again while slots are filled
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    int32_t* slots = slots_of_row + row * k;
    float* slot_weights = weights_of_row + row * k;
    for (int64_t j = 0; j < k; ++j) {
      Segment& segment = segments[ids[row * k + j]];
      const auto slot = static_cast<int32_t>(segment.first_row + segment.num_rows++);
      row_of_slot[slot] = static_cast<int32_t>(row);
      expert_of_slot[slot] = static_cast<int32_t>(ids[row * k + j]);
      int64_t at = j;  // insertion keeps a row's few slots ascending
      for (; at > 0 && slots[at - 1] > slot; --at) {
        slots[at] = slots[at - 1];
        slot_weights[at] = slot_weights[at - 1];
      }
      slots[at] = slot;
      slot_weights[at] = weights[row * k + j];
    }
  }
}

}  // namespace mixtral
