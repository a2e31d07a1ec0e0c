// The operations of a layer as Python calls them, and as layers.cpp calls them one after another. Each runs its own
// parallel region. Structures are filled in field by field by native_products.py and native_layers.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "products.h"

namespace mixtral {

// One matrix in the packed layout of formats.py, or all experts' matrices of one role behind each other.
struct PackedWeights {
  const uint8_t* quants;
  const void* scales;
};

struct LinearWeights {
  PackedWeights weights;
  int64_t num_cols;
  int64_t num_outputs;
  int32_t kind;
};

// The rows that meet packed matrices.
struct LinearRows {
  const float* x;  // [num_rows, num_cols]
  void* scratch;   // mixtral_linear_scratch_bytes(num_rows, num_cols, kind)
  int64_t num_rows;
  int64_t num_cols;
  Kind kind;
  int num_threads;
};

struct ExpertsCall {
  const float* hidden;   // [num_rows, num_cols]
  const int64_t* ids;    // [num_rows, k]
  const float* weights;  // [num_rows, k]
  PackedWeights w1, w2, w3;
  float* out;  // [num_rows, num_cols]
  void* scratch;
  int64_t num_rows;
  int64_t num_cols;
  int64_t k;
  int64_t num_experts;
  int64_t num_inner_tiles;  // tiles of w1 and w3
  int32_t kind;
  int32_t num_threads;
};

// A product of several that share their rows.
struct Factor {
  PackedWeights weights;
  float* out;  // [num_rows, num_outputs]
  int64_t num_outputs;
};

constexpr int kMaxFactors = 3;

// Every factor with the same rows, which are quantised once, in one region.
void multiply_rows(const LinearRows& rows, const Factor* factors, int num_factors);

}  // namespace mixtral

extern "C" {
int64_t mixtral_linear_scratch_bytes(int64_t num_rows, int64_t num_cols, int32_t kind);
int64_t mixtral_experts_scratch_bytes(int64_t num_rows, int64_t num_cols, int64_t k, int64_t num_experts,
                                      int64_t num_inner_tiles, int32_t kind);
int mixtral_experts(const mixtral::ExpertsCall* call);
int mixtral_paged_attention(const mixtral::AttentionCall* call);
void mixtral_rms_norm(const float* x, const float* weight, float* out, int64_t num_rows, int64_t width, float epsilon,
                      int64_t num_threads);
void mixtral_route(const float* hidden, const float* gate, float* logits, float* weights, int64_t* experts,
                   int64_t num_rows, int64_t width, int64_t num_experts, int64_t k, int64_t num_threads);
}
