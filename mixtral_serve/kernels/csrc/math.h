// The exponential and SiLU of all kernels: one sequence of operations that every instruction set carries out alike.
//
// exp(x) = 2^n * exp(r) with n = round(x / ln 2): n by adding and subtracting 1.5 * 2^23, r by two fused steps, exp(r)
// by a polynomial of degree 6. Within 1 unit in the last place of the true value for -87.3 <= x <= 88.3; below that 0,
// above infinity, NaN stays NaN. math_avx2.h and math_avx512.h hold the same steps on vectors; a step changed here is
// changed there.
//
// Rejected: std::exp (differs between C libraries, and has no vector form); a division of the range by a table
// (gathers).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mixtral {

constexpr float kExpLow = -0x1.5d58ap+6f;       // -87.3365: 2^n is normal from here on
constexpr float kExpHigh = 0x1.61814ap+6f;      // 88.3763: 2^n is finite up to here
constexpr float kExpLog2e = 0x1.715476p+0f;     // 1 / ln 2
constexpr float kExpLn2High = 0x1.62e43p-1f;    // ln 2 in two parts
constexpr float kExpLn2Low = -0x1.05c61p-29f;
constexpr float kExpRound = 0x1.8p+23f;         // adding it leaves no bits behind the point
constexpr uint32_t kExpRoundBits = 0x4b400000u; // its bits: the sum's bits minus these are the integer
constexpr float kExpC2 = 0x1.fffffcp-2f;        // exp(r) = 1 + r + r^2 * (C2 + C3 r + C4 r^2 + C5 r^3 + C6 r^4)
constexpr float kExpC3 = 0x1.555492p-3f;
constexpr float kExpC4 = 0x1.5558f2p-5f;
constexpr float kExpC5 = 0x1.1239e4p-7f;
constexpr float kExpC6 = 0x1.6a242cp-10f;

static inline float exp_f32(float x) {
  if (x < kExpLow) return 0.0f;
  if (x > kExpHigh) return std::numeric_limits<float>::infinity();
  const float shifted = std::fma(x, kExpLog2e, kExpRound);
  const float n = shifted - kExpRound;
  float r = std::fma(n, -kExpLn2High, x);
  r = std::fma(n, -kExpLn2Low, r);
  float q = std::fma(kExpC6, r, kExpC5);
  q = std::fma(q, r, kExpC4);
  q = std::fma(q, r, kExpC3);
  q = std::fma(q, r, kExpC2);
  const float fraction = std::fma(q, r * r, r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - kExpRoundBits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return fraction * power;
}

// x / (1 + exp(-x)).
static inline float silu_f32(float x) { return x / (1.0f + exp_f32(-x)); }

}  // namespace mixtral
