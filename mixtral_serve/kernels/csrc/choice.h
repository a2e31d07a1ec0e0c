// What the ways of choosing a row's token share: what is asked, the row, and the memory they work in.
//
//   choice.cpp        the entry point; the most likely token, and one drawn from the whole vocabulary
//   choice_few.cpp    one drawn from what filters leave, by looking at the most likely few
//   choice_whole.cpp  the same for any row, by weighing all of it
//
// The law: a token depends on nothing but its row, and whatever the numbers are, it lies within the row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scratch.h"
#include "vocabulary.h"

namespace mixtral {

constexpr int64_t kUnsettled = -1, kNotFinite = -2;
constexpr int64_t kChunk = 64;  // numbers of which the largest is known; model/draws.py proposes tokens by as many
constexpr int64_t kShareChunk = 256;  // numbers whose shares are added up together
constexpr int64_t kNumBuckets = 2048;

inline int64_t chunks_of(int64_t width, int64_t length) { return (width + length - 1) / length; }

// What a row asks for: a row of the tensor that native_choice.py fills. A filter that is not a number is off.
struct Asked {
  double temperature;  // 0: the most likely token
  double top_k;        // 0: all
  double top_p;
  double min_p;
  double draw;  // in [0, 1); its first 53 bits count

  // 0 where it is off.
  int64_t most_kept(int64_t width) const {
    return top_k > 0.0 && top_k < static_cast<double>(width) ? std::max<int64_t>(static_cast<int64_t>(top_k), 1) : 0;
  }
  bool has_nucleus() const { return top_p < 1.0; }
  bool filters(int64_t width) const { return most_kept(width) > 0 || has_nucleus() || min_p > 0.0; }
  double fraction() const { return draw >= 0.0 && draw < 1.0 ? draw : 0.0; }

  // What differences to the largest number are multiplied by. A temperature below the least is not distinguishable from
  // it, and its inverse would be infinite in fp32.
  float scale() const { return static_cast<float>(1.0 / std::max(temperature, 1e-30)); }
};

// What one thread works in, row after row.
struct ChoiceScratch {
  ChoiceScratch(void* memory, int64_t width) {
    Scratch scratch(memory);
    maxima = scratch.take<float>(chunks_of(width, kChunk));
    bounds = scratch.take<float>(chunks_of(width, kChunk));
    reached = scratch.take<double>(chunks_of(width, kChunk));
    shares = scratch.take<float>(chunks_of(width, kShareChunk));
    weights = scratch.take<double>(width);
    buckets = scratch.take<int32_t>(width);
    ids = scratch.take<int32_t>(width);
    bucket_sums = scratch.take<double>(kNumBuckets);
    bucket_counts = scratch.take<int32_t>(kNumBuckets);
    end_ = scratch.take<char>(0);
  }

  static int64_t bytes(int64_t width) { return ChoiceScratch(nullptr, width).end_ - static_cast<char*>(nullptr); }

  float* maxima;           // [chunks of kChunk]
  float* bounds;           // [chunks of kChunk]: weights of the maxima
  double* reached;         // [chunks of kChunk]: sums of weights up to each
  float* shares;           // [chunks of kShareChunk]
  double* weights;         // [width]
  int32_t* buckets;        // [width]
  int32_t* ids;            // [width]
  double* bucket_sums;     // [kNumBuckets]
  int32_t* bucket_counts;  // [kNumBuckets]

 private:
  char* end_;
};

// A row whose largest number, `peak`, is finite, and whose chunks' maxima stand in the scratch memory.
struct ChoiceRow {
  const VocabularyKernel& kernel;
  const Asked& asked;
  const float* x;
  int64_t width;
  float peak;
  const ChoiceScratch& scratch;

  int64_t num_chunks() const { return chunks_of(width, kChunk); }

  // The lowest id among equals.
  int64_t most_likely() const {
    const float* chunk = std::find(scratch.maxima, scratch.maxima + num_chunks(), peak);
    return std::find(x + (chunk - scratch.maxima) * kChunk, x + width, peak) - x;
  }
};

// The last chunk with a weight, where rounding has lifted a target to the total.
inline double* last_with_weight(double* reached, int64_t num_chunks) {
  return std::lower_bound(reached, reached + num_chunks - 1, reached[num_chunks - 1]);
}

// A token drawn from what filters leave, or kUnsettled where it takes more than the most likely few to tell.
int64_t draw_from_few(const ChoiceRow& row);

// A token drawn from what filters leave, if there are any.
int64_t draw_from_whole(const ChoiceRow& row);

}  // namespace mixtral
