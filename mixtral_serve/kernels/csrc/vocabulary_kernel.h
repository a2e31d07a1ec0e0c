// Passes over wide rows, written once for all instruction sets; included like attention_kernel.h.
#pragma once

#include "math.h"
#include "vocabulary.h"

namespace mixtral {
namespace {

// body(chunk, its first number, how many) for every chunk of a row; the last one may be short.
template <typename Body>
inline void for_each_chunk(const ChunkCall& call, const Body& body) {
  for (int64_t first = 0, chunk = 0; first < call.width; first += call.length, ++chunk) {
    body(chunk, first, call.width - first < call.length ? call.width - first : call.length);
  }
}

void chunk_maxima(const ChunkCall& call, int64_t first, int64_t end) {
  const int64_t num_chunks = (call.width + call.length - 1) / call.length;
  for (int64_t row = first; row < end; ++row) {
    for_each_chunk(call, [&](int64_t chunk, int64_t from, int64_t count) {
      const float* x = call.rows + row * call.width + from;
      float largest = x[0];
      int64_t i = 0;
      if (count >= 16) {
        Lanes lanes = load(x);
        for (i = 16; i + 16 <= count; i += 16) lanes = larger(lanes, load(x + i));
        largest = largest_of(lanes);
      }
      for (; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
      call.out[row * num_chunks + chunk] = largest;
    });
  }
}

void chunk_shares(const ChunkCall& call, int64_t first, int64_t end) {
  const int64_t num_chunks = (call.width + call.length - 1) / call.length;
  for (int64_t row = first; row < end; ++row) {
    const float peak = call.peaks[row], scale = call.scales[row];
    const Lanes peaks = broadcast(peak), scales = broadcast(scale);
    for_each_chunk(call, [&](int64_t chunk, int64_t from, int64_t count) {
      const float* x = call.rows + row * call.width + from;
      Lanes sums = broadcast(0.0f);
      int64_t i = 0;
      for (; i + 32 <= count; i += 32) {
        Lanes shares[] = {times(minus(load(x + i), peaks), scales), times(minus(load(x + i + 16), peaks), scales)};
        exponential_of_nonpositive(shares);
        sums = plus(plus(sums, shares[0]), shares[1]);
      }
      for (; i + 16 <= count; i += 16) sums = plus(sums, exponential(times(minus(load(x + i), peaks), scales)));
      alignas(64) float lanes[16];
      store(lanes, sums);
      for (int64_t j = i; j < count; ++j) lanes[j - i] += exp_f32((x[j] - peak) * scale);
      call.out[row * num_chunks + chunk] = sum_of(load(lanes));
    });
  }
}

void exponentials(const float* x, int64_t count, float peak, float scale, float* out) {
  const Lanes peaks = broadcast(peak), scales = broadcast(scale);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, exponential(times(minus(load(x + i), peaks), scales)));
  for (; i < count; ++i) out[i] = exp_f32((x[i] - peak) * scale);
}

// A number times 0 is 0 if it is finite, and NaN otherwise, which no sum forgets, whatever its order.
void finite_rows(const float* rows, int64_t width, uint8_t* out, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    const float* x = rows + row * width;
    const Lanes zeros = broadcast(0.0f);
    Lanes sums[4] = {zeros, zeros, zeros, zeros};  // one alone would wait for itself
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) sums[s] = fused(load(x + i + 16 * s), zeros, sums[s]);
    }
    for (; i + 16 <= width; i += 16) sums[0] = fused(load(x + i), zeros, sums[0]);
    float sum = sum_of(plus(plus(sums[0], sums[1]), plus(sums[2], sums[3])));
    for (; i < width; ++i) sum += x[i] * 0.0f;
    out[row] = sum == 0.0f;
  }
}

// As chunk_maxima and finite_rows, on one way through memory.
bool finite_maxima(const float* x, int64_t width, int64_t length, float* out) {
  const Lanes zeros = broadcast(0.0f);
  Lanes sums[4] = {zeros, zeros, zeros, zeros};
  float rest = 0.0f;
  for (int64_t first = 0; first < width; first += length) {
    const int64_t end = width - first < length ? width : first + length;
    Lanes largest = broadcast(x[first]);
    int64_t i = first;
    for (; i + 64 <= end; i += 64) {
      Lanes numbers[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) numbers[s] = load(x + i + 16 * s);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) sums[s] = fused(numbers[s], zeros, sums[s]);
      largest = larger(largest, larger(larger(numbers[0], numbers[1]), larger(numbers[2], numbers[3])));
    }
    float most = largest_of(largest);
    for (; i < end; ++i) {
      rest += x[i] * 0.0f;
      most = x[i] > most ? x[i] : most;
    }
    *out++ = most;
  }
  return rest + sum_of(plus(plus(sums[0], sums[1]), plus(sums[2], sums[3]))) == 0.0f;
}

}  // namespace
}  // namespace mixtral
