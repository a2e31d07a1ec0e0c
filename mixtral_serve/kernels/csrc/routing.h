// Which row goes to which expert: slots, sorted by expert.
//
// Every (row, chosen expert) pair is a slot. Slots are sorted by expert, and by row within an expert, so that an
// expert's slots are one segment. A row's slots in ascending order are its experts in ascending id: the order of its
// sum.
#pragma once

#include <cstdint>

#include "row_blocks.h"

namespace mixtral {

struct Routing {
  int64_t num_experts;
  int64_t k;
  int32_t* row_of_slot;     // [rows * k]
  int32_t* expert_of_slot;  // [rows * k]
  int32_t* slots_of_row;    // [rows][k], ascending
  float* weights_of_row;    // [rows][k], of those slots
  Segment* segments;        // [num_experts], empty where nobody chose the expert

  static Routing take(Scratch& scratch, int64_t num_rows, int64_t num_experts, int64_t k);

  // Sorts `ids` and `weights` [num_rows, k]; the segments are cut as `kernels` want them for `kind`.
  void sort(const int64_t* ids, const float* weights, int64_t num_rows, const Kernels& kernels,
            Kind kind);
};

// Whether every id names an expert.
bool ids_are_valid(const int64_t* ids, int64_t count, int64_t num_experts);

}  // namespace mixtral
