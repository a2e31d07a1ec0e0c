// What sampling asks of rows as wide as the vocabulary: whether they are finite, the largest number of every chunk, and
// the share of every chunk in the distribution, whose total cuts a nucleus. Each is one pass over numbers that lie in a
// cache.
//
// The law: a row's results depend on nothing but the row. Sums are sixteen sums of the elements at positions equal
// modulo 16 within the chunk, ascending, added pairwise as in rowwise.h.
#pragma once

#include <cstdint>

namespace mixtral {

struct ChunkCall {
  const float* rows;  // [num_rows, width]
  float* out;         // [num_rows, chunks]
  int64_t num_rows, width, length;
  // Of shares only: out = sum of exp((x - peak) * scale) over the chunk.
  const float* peaks;   // [num_rows], at least the row's largest: exponentials of more than zero may differ
  const float* scales;  // [num_rows]
};

// On rows [first, end), or on one.
struct VocabularyKernel {
  void (*maxima)(const ChunkCall& call, int64_t first, int64_t end);
  // Maxima of a row's chunks, which mean nothing unless it returns that all its numbers are finite.
  bool (*finite_maxima)(const float* row, int64_t width, int64_t length, float* out);
  void (*shares)(const ChunkCall& call, int64_t first, int64_t end);
  void (*finite)(const float* rows, int64_t width, uint8_t* out, int64_t first, int64_t end);
  // out[i] = exp((x[i] - peak) * scale)
  void (*exponentials)(const float* x, int64_t count, float peak, float scale, float* out);
};

// That of the instruction set in use.
const VocabularyKernel& active_vocabulary_kernel();

extern const VocabularyKernel kVocabularyPortable;
#if defined(__x86_64__)
extern const VocabularyKernel kVocabularyAvx2;
#endif

}  // namespace mixtral
