// products.h for AVX-512 with VNNI: sixteen outputs in the lanes, four columns per instruction, rows broadcast from
// memory. Loops over rows are unrolled for every size of block, so that sums stay in registers.
#include <cstdint>
#include <limits>

#include "math.h"
#include "products.h"

#if defined(__x86_64__)
#include "avx512_target.h"

#include "math_avx512.h"
#include "rows_avx512.h"

namespace mixtral {
namespace {

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

// Pieces of four columns.
void quantize_row(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  const int64_t distance = 4 * place.num_block_rows;
  const auto put = [&](int64_t first, __m128i bytes) {
    int8_t* out = place.quants + first / 4 * distance + 4 * place.row;
    _mm_storeu_si32(out, bytes);
    _mm_storeu_si32(out + distance, _mm_bsrli_si128(bytes, 4));
    _mm_storeu_si32(out + 2 * distance, _mm_bsrli_si128(bytes, 8));
    _mm_storeu_si32(out + 3 * distance, _mm_bsrli_si128(bytes, 12));
  };
  const auto put_sum = [&](int64_t g, __m512i sum) {
    if (kind == Kind::int4) place.offsets[g * place.num_block_rows + place.row] = -8 * _mm512_reduce_add_epi32(sum);
  };
  const int32_t sum = quantize_columns(x, num_cols, num_groups, place.scale, put, put_sum);
  if (kind == Kind::int8) place.offsets[place.row] = -128 * sum;
}

inline __m512i broadcast(const int8_t* piece) {
  int32_t value;
  __builtin_memcpy(&value, piece, sizeof value);
  return _mm512_set1_epi32(value);
}

template <int kRows>
void int8_tile(const Block& block, const Tile& tile, const Visit& visit, float* out, int64_t stride) {
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
  Ahead ahead = ahead_of(tile, visit, num_lines);
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

// Sums of the rows with group `g`, which fit into 16 bits.
template <int kRows>
inline void int4_group(const Block& block, const uint8_t* group, int64_t g, Ahead& ahead, __m512i (&sums)[kRows]) {
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_set1_epi32(block.offsets[g * kRows + r]);
  MIXTRAL_UNROLL
  for (int v = 0; v < 4; ++v, ahead.quants += ahead.step) {
    prefetch(ahead.quants);
    int4_line<kRows>(group + v * 64, block.quants + (g * 8 + v * 2) * 4 * kRows, sums);
  }
}

template <int kRows>
void int4_tile(const Block& block, const Tile& tile, const Visit& visit, float* out, int64_t stride) {
  __m512 totals[kRows];
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) totals[r] = _mm512_setzero_ps();
  Ahead ahead = ahead_of(tile, visit, block.num_groups * 4);
  for (int64_t s = 0, g = 0; g < block.num_groups; ++s) {
    const SectionScales section = SectionScales::of(tile.scales, s, block.num_groups);
    __m512i section_sums[kRows];
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) section_sums[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < section.num_groups; ++i, ++g) {
      __m512i sums[kRows];
      int4_group<kRows>(block, tile.quants + g * 256, g, ahead, sums);
      if (i % 4 == 0) {
        prefetch(ahead.scales);
        ahead.scales += ahead.step;
      }
      // The low word of each sum times the multiplier; the high words, times zero, add nothing.
      const auto* multipliers = reinterpret_cast<const __m128i*>(section.multipliers + i * kTileRows);
      const __m512i words =
          _mm512_and_si512(_mm512_cvtepi8_epi32(_mm_loadu_si128(multipliers)), _mm512_set1_epi32(0xffff));
      MIXTRAL_UNROLL
      for (int r = 0; r < kRows; ++r) section_sums[r] = _mm512_dpwssd_epi32(section_sums[r], sums[r], words);
    }
    const __m512 scales = _mm512_loadu_ps(section.scales);
    MIXTRAL_UNROLL
    for (int r = 0; r < kRows; ++r) totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(section_sums[r]), scales, totals[r]);
  }
  MIXTRAL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(out + r * stride, _mm512_mul_ps(totals[r], _mm512_set1_ps(block.scales[r])));
  }
}

using TileKernel = void (*)(const Block&, const Tile&, const Visit&, float*, int64_t);

constexpr TileKernel kInt8ByRows[kNarrowBlockRows] = {
    int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>,  int8_tile<5>,  int8_tile<6>,
    int8_tile<7>, int8_tile<8>, int8_tile<9>, int8_tile<10>, int8_tile<11>, int8_tile<12>};
constexpr TileKernel kInt4ByRows[kNarrowBlockRows] = {
    int4_tile<1>, int4_tile<2>, int4_tile<3>, int4_tile<4>,  int4_tile<5>,  int4_tile<6>,
    int4_tile<7>, int4_tile<8>, int4_tile<9>, int4_tile<10>, int4_tile<11>, int4_tile<12>};

// One tile after the other: two at a time measured slower, since two streams from memory come slower than one.
template <const TileKernel* by_rows>
void multiply(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  for (int b = 0; b < num_blocks; out += blocks[b].num_rows * stride, ++b) {
    const TileKernel kernel = by_rows[blocks[b].num_rows - 1];
    for (int t = 0; t < num_tiles; ++t) kernel(blocks[b], tiles[t], {b, num_blocks}, out + t * kTileRows, stride);
  }
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
  static constexpr Kernels kernels = {
      {kAllNarrow, kAllNarrow}, 0, quantize_row, multiply<kInt8ByRows>, multiply<kInt4ByRows>, gate, combine};
  return kernels;
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
