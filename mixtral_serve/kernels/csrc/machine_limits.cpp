// What this machine can do at most: a plain read of memory, and integer products on registers alone. Measurements
// relate the kernels to these two.
#include <cstdint>

#include "amx_tiles.h"
#include "cpu.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral {
namespace {

// A thread takes this much at a time, as the products take a few neighbouring tiles.
constexpr int64_t kReadBytes = 256 << 10;

uint64_t read_portable(const uint64_t* words, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t read_avx2(const uint64_t* words, int64_t count) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i + 16 <= count; i += 16) {
    for (int j = 0; j < 4; ++j) {
      sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i + 4 * j)));
    }
  }
  alignas(32) uint64_t lanes[4];
  const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

// Sums that do not wait for each other; every loop over them is unrolled, so that they stay in registers.
constexpr int kAvx2Chains = 10;
constexpr int kAvx512Chains = 16;
constexpr int kAmxChains = 4;

// Multiplications and additions of one round: chains * products per instruction * 2.
__attribute__((target("avx2"))) int64_t multiply_avx2(int64_t rounds) {
  __m256i sums[kAvx2Chains];
#pragma GCC unroll 16
  for (int j = 0; j < kAvx2Chains; ++j) {
    sums[j] = _mm256_setzero_si256();
    asm volatile("" : "+x"(sums[j]));  // the compiler must not know that all are equal
  }
  __m256i weights = _mm256_set1_epi8(3), columns = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAvx2Chains; ++j) {
      asm volatile("" : "+x"(weights), "+x"(columns));  // or equal products would be made once
      const __m256i words = _mm256_maddubs_epi16(weights, columns);
      sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(words, ones));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kAvx2Chains; ++j) asm volatile("" : : "x"(sums[j]));
  return rounds * kAvx2Chains * 32 * 2;
}

__attribute__((target("avx512f,avx512vnni"))) int64_t multiply_avx512(int64_t rounds) {
  __m512i sums[kAvx512Chains];
#pragma GCC unroll 16
  for (int j = 0; j < kAvx512Chains; ++j) {
    sums[j] = _mm512_set1_epi32(0);
    asm volatile("" : "+v"(sums[j]));
  }
  __m512i weights = _mm512_set1_epi32(0x03030303), columns = _mm512_set1_epi32(0x05050505);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(weights), "+v"(columns));
#pragma GCC unroll 16
    for (int j = 0; j < kAvx512Chains; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], weights, columns);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kAvx512Chains; ++j) asm volatile("" : : "v"(sums[j]));
  return rounds * kAvx512Chains * 64 * 2;
}

int64_t multiply_amx(int64_t rounds) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16);
  take_tiles(shapes);
  for (int64_t i = 0; i < rounds; ++i) {
    multiply_tiles<0, 4, 6, false>();
    multiply_tiles<1, 4, 7, false>();
    multiply_tiles<2, 5, 6, false>();
    multiply_tiles<3, 5, 7, false>();
  }
  release_tiles();
  return rounds * kAmxChains * 16 * 16 * 64 * 2;
}
#endif

// The instructions of the portable kernels are the compiler's choice; four products at a time is what C++ says.
int64_t multiply_portable(int64_t rounds) {
  int32_t sums[16] = {};
  uint8_t weights[64];
  int8_t columns[4] = {1, 2, 3, 4};
  for (int i = 0; i < 64; ++i) weights[i] = static_cast<uint8_t>(i);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : : "r"(weights), "r"(columns) : "memory");
    for (int o = 0; o < 16; ++o) {
      const uint8_t* w = weights + 4 * o;
      sums[o] += w[0] * columns[0] + w[1] * columns[1] + w[2] * columns[2] + w[3] * columns[3];
    }
  }
  asm volatile("" : : "r"(sums) : "memory");
  return rounds * 64 * 2;
}

uint64_t read(const uint64_t* words, int64_t count) {
#if defined(__x86_64__)
  if (active_isa() != Isa::portable) return read_avx2(words, count);
#endif
  return read_portable(words, count);
}

int64_t multiply(int64_t rounds) {
#if defined(__x86_64__)
  if (active_isa() == Isa::amx) return multiply_amx(rounds);
  if (active_isa() == Isa::avx512vnni) return multiply_avx512(rounds);
  if (active_isa() == Isa::avx2) return multiply_avx2(rounds);
#endif
  return multiply_portable(rounds);
}

}  // namespace
}  // namespace mixtral

extern "C" {

// Reads `num_bytes` and returns a sum of what was read.
__attribute__((visibility("default"))) uint64_t mixtral_read_memory(const void* memory, int64_t num_bytes,
                                                                    int32_t num_threads) {
  std::atomic<uint64_t> total{0};
  const int64_t num_tasks = (num_bytes + mixtral::kReadBytes - 1) / mixtral::kReadBytes;
  mixtral::parallel(num_threads, [&](mixtral::Team& team) {
    team.for_each(0, num_tasks, 1, [&](int64_t index, int64_t) {
      const int64_t first = index * mixtral::kReadBytes;
      const int64_t bytes = num_bytes - first < mixtral::kReadBytes ? num_bytes - first : mixtral::kReadBytes;
      total += mixtral::read(reinterpret_cast<const uint64_t*>(static_cast<const char*>(memory) + first), bytes / 8);
    });
  });
  return total;
}

// Multiplies bytes on registers, `rounds` rounds on each thread; returns how many multiplications and additions.
__attribute__((visibility("default"))) int64_t mixtral_multiply_registers(int64_t rounds, int32_t num_threads) {
  std::atomic<int64_t> total{0};
  mixtral::parallel(num_threads, [&](mixtral::Team&) { total += mixtral::multiply(rounds); });
  return total;
}
}
