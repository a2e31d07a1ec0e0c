// products.h for AVX-512 with VNNI: sixteen outputs in the lanes, four columns per instruction, rows broadcast from
// memory. Loops over rows are unrolled for every size of block, so that sums stay in registers.
#include <cstdint>
#include <limits>

#include "math.h"
#include "products.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#endif
#if !defined(__clang__)
// GCC's own header reads what it calls undefined, and warns about it wherever it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "math_avx512.h"

#define MIXTRAL_UNROLL _Pragma("GCC unroll 16")

namespace mixtral {
namespace {

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

uint32_t largest_magnitude(const float* x, int64_t num_cols) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < num_cols; i += 16) {
    const __mmask16 valid = num_cols - i < 16 ? static_cast<__mmask16>((1u << (num_cols - i)) - 1) : 0xffff;
    const __m512i bits = _mm512_maskz_loadu_epi32(valid, x + i);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, mask));
  }
  return _mm512_reduce_max_epu32(largest);
}

// Writes 16 quantised columns as four pieces, and returns them as integers.
inline __m512i quantize_16(const float* x, int64_t count, __m512 inverse, int8_t* out, int64_t distance) {
  const __mmask16 valid = count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x), inverse));
  const __m128i bytes = _mm512_cvtepi32_epi8(q);
  _mm_storeu_si32(out, bytes);
  _mm_storeu_si32(out + distance, _mm_bsrli_si128(bytes, 4));
  _mm_storeu_si32(out + 2 * distance, _mm_bsrli_si128(bytes, 8));
  _mm_storeu_si32(out + 3 * distance, _mm_bsrli_si128(bytes, 12));
  return q;
}

void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const uint32_t largest = largest_magnitude(x, num_cols);
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(largest))));
  const bool finite = largest < 0x7f800000u;
  float inverse = 127.0f / absmax;
  const bool usable = finite && inverse <= std::numeric_limits<float>::max();
  *place.scale = usable ? absmax / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const __m512 inverses = _mm512_set1_ps(inverse);
  const int64_t distance = 4 * place.num_block_rows;
  __m512i row_sum = _mm512_setzero_si512();
  for (int64_t g = 0; g < num_groups; ++g) {
    // A row that cannot be used is read as if it had no columns: zeros.
    const int64_t first = g * kGroupCols, count = usable ? num_cols - first : 0;
    int8_t* out = place.quants + g * 8 * distance;
    const __m512i low = quantize_16(x + first, count, inverses, out, distance);
    const __m512i high = quantize_16(x + first + 16, count - 16, inverses, out + 4 * distance, distance);
    const __m512i sum = _mm512_add_epi32(low, high);
    if (kind == Kind::int4) place.offsets[g * place.num_block_rows] = -8 * _mm512_reduce_add_epi32(sum);
    row_sum = _mm512_add_epi32(row_sum, sum);
  }
  if (kind == Kind::int8) *place.offsets = -128 * _mm512_reduce_add_epi32(row_sum);
}

inline __m512i broadcast(const int8_t* piece) {
  int32_t value;
  __builtin_memcpy(&value, piece, sizeof value);
  return _mm512_set1_epi32(value);
}

template <int kRows>
void int8_tile(const Block& block, const Tile& tile, float* out, int64_t stride) {
  // Additions wait for each other: a few rows alternate between several sums, which changes no integer.
  constexpr int kChains = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
  __m512i sums[kChains][kRows];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sums[0][r] = _mm512_set1_epi32(block.offsets[r]);
    MIXTRAL_UNROLL
    for (int i = 1; i < kChains; ++i) sums[i][r] = _mm512_setzero_si512();
  }
  const int8_t* row = block.quants;
  const int64_t num_lines = block.num_groups * 8;
  Ahead ahead = ahead_of(tile, num_lines);
  for (int64_t c = 0; c < num_lines; c += kChains) {
    MIXTRAL_UNROLL
    for (int i = 0; i < kChains; ++i, row += 4 * kRows) {
      const __m512i weights = _mm512_loadu_si512(tile.quants + (c + i) * 64);
      // With few rows the hardware's own prefetching keeps up, and measured faster alone.
      if (kChains == 1) prefetch(ahead.quants);
      ahead.quants += ahead.step;
      MIXTRAL_UNROLL
      for (int r = 0; r < kRows; ++r) sums[i][r] = _mm512_dpbusd_epi32(sums[i][r], weights, broadcast(row + 4 * r));
    }
  }
  const __m512 scales = _mm512_loadu_ps(static_cast<const float*>(tile.scales));
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MIXTRAL_UNROLL
    for (int i = 1; i < kChains; ++i) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[i][r]);
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[0][r]), scales);
    _mm512_storeu_ps(out + r * stride, _mm512_mul_ps(scaled, _mm512_set1_ps(block.scales[r])));
  }
}

template <int kRows>
inline void int4_line(const uint8_t* line, const int8_t* row, __m512i (&sums)[kRows]) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i both = _mm512_loadu_si512(line);
  const __m512i low = _mm512_and_si512(both, mask);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], low, broadcast(row + 4 * r));
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], high, broadcast(row + 4 * (kRows + r)));
}

template <int kRows>
void int4_tile(const Block& block, const Tile& tile, float* out, int64_t stride) {
  __m512 totals[kRows];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) totals[r] = _mm512_setzero_ps();
  const auto* scales = static_cast<const uint16_t*>(tile.scales);
  Ahead ahead = ahead_of(tile, block.num_groups * 4);
  for (int64_t g = 0; g < block.num_groups; ++g) {
    __m512i sums[kRows];
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) sums[r] = _mm512_set1_epi32(block.offsets[g * kRows + r]);
    MIXTRAL_UNROLL
    for (int v = 0; v < 4; ++v, ahead.quants += ahead.step) {
      prefetch(ahead.quants);
      int4_line<kRows>(tile.quants + g * 256 + v * 64, block.quants + (g * 8 + v * 2) * 4 * kRows, sums);
    }
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + g * kTileRows));
    prefetch(ahead.scales);
    ahead.scales += ahead.step / 2;
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), scale, totals[r]);
  }
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(out + r * stride, _mm512_mul_ps(totals[r], _mm512_set1_ps(block.scales[r])));
  }
}

// One tile after the other: two at a time measured slower, since two streams from memory come slower than one.
using TileKernel = void (*)(const Block&, const Tile&, float*, int64_t);

void multiply(const TileKernel* by_rows, const Block& block, const Tile* tiles, int num_tiles, float* out,
              int64_t stride) {
  const TileKernel kernel = by_rows[block.num_rows - 1];
  for (int t = 0; t < num_tiles; ++t) kernel(block, tiles[t], out + t * kTileRows, stride);
}

constexpr TileKernel kInt8ByRows[kMaxBlockRows] = {
    int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>,  int8_tile<5>,  int8_tile<6>,
    int8_tile<7>, int8_tile<8>, int8_tile<9>, int8_tile<10>, int8_tile<11>, int8_tile<12>};
constexpr TileKernel kInt4ByRows[kMaxBlockRows] = {
    int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>,  int4_tile<5>,  int4_tile<6>,
    int4_tile<7>, int4_tile<8>, int4_tile<9>, int4_tile<10>, int4_tile<11>, int4_tile<12>};

void multiply_int8(const Block& block, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  multiply(kInt8ByRows, block, tiles, num_tiles, out, stride);
}

void multiply_int4(const Block& block, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  multiply(kInt4ByRows, block, tiles, num_tiles, out, stride);
}

void gate(const float* both, int num_rows, float* out, int64_t stride) {
  for (int r = 0; r < num_rows; ++r) {
    const float* row = both + r * 2 * kTileRows;
    const __m512 gated = _mm512_mul_ps(silu_f32x16(_mm512_loadu_ps(row)), _mm512_loadu_ps(row + kTileRows));
    _mm512_storeu_ps(out + r * stride, gated);
  }
}

void combine(const float* const* parts, const float* weights, int64_t k, int64_t num_cols, float* out) {
  for (int64_t c = 0; c < num_cols; c += 16) {
    const __mmask16 valid = num_cols - c < 16 ? static_cast<__mmask16>((1u << (num_cols - c)) - 1) : 0xffff;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; ++i) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), _mm512_maskz_loadu_ps(valid, parts[i] + c), sum);
    }
    _mm512_mask_storeu_ps(out + c, valid, sum);
  }
}

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = {1, quantize_row, multiply_int8, multiply_int4, gate, combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
