// The row-wise kernels in plain C++, for any CPU: sixteen floats are an array.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "math.h"

namespace mixtral {
namespace {

struct Lanes {
  float at[16];
};

// How many rows, and lanes for so many rows, the products of attention hold in registers.
constexpr int kMaxRows = 4;
constexpr int registers_wide(int) { return 1; }

template <typename Function>
inline Lanes each(const Function& function) {
  Lanes result;
  for (int i = 0; i < 16; ++i) result.at[i] = function(i);
  return result;
}

inline Lanes load(const float* from) {
  Lanes result;
  std::memcpy(result.at, from, sizeof result.at);
  return result;
}

inline void store(float* to, const Lanes& x) { std::memcpy(to, x.at, sizeof x.at); }
inline Lanes broadcast(float x) { return each([&](int) { return x; }); }
inline Lanes plus(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
inline Lanes minus(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.at[i] - b.at[i]; }); }
inline Lanes times(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
inline Lanes over(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.at[i] / b.at[i]; }); }
inline Lanes larger(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
inline Lanes exponential(const Lanes& x) { return each([&](int i) { return exp_f32(x.at[i]); }); }
inline void exponential_of_nonpositive(Lanes (&x)[2]) {
  for (Lanes& lanes : x) lanes = exponential(lanes);
}

// Lanes from <= i < to of x, the others of `other`.
inline Lanes within(const Lanes& x, const Lanes& other, int64_t from, int64_t to) {
  return each([&](int i) { return from <= i && i < to ? x.at[i] : other.at[i]; });
}

inline Lanes load_bf16(const uint16_t* from) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
}
inline Lanes load_int8(const int8_t* from) {
  return each([&](int i) { return static_cast<float>(from[i]); });
}

inline float first_of(const Lanes& x) { return x.at[0]; }

inline float sum_of(Lanes x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.at[i] = x.at[i] + x.at[i + half];
  }
  return x.at[0];
}

inline float largest_of(Lanes x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.at[i] = x.at[i] > x.at[i + half] ? x.at[i] : x.at[i + half];
  }
  return x.at[0];
}

}  // namespace
}  // namespace mixtral

#include "attention_kernel.h"
#include "rowwise_kernel.h"
#include "vocabulary_kernel.h"

namespace mixtral {

const AttentionKernel kAttentionPortable = {attend, merge};
const RowwiseKernel kRowwisePortable = {rms_norm, route};
const VocabularyKernel kVocabularyPortable = {chunk_maxima, finite_maxima, chunk_shares, finite_rows, exponentials};

}  // namespace mixtral
