// AMX's tile registers: eight, of up to sixteen rows of 64 bytes.
//
// The instructions are written as assembly: some compilers' intrinsics say nothing of the memory they read, and stores to
// it are then left out or come too late.
#pragma once

#if defined(__x86_64__)

#include <cstdint>

namespace mixtral {
namespace {

// What `ldtilecfg` reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Of register `tile`; without rows it cannot be used.
  void set(int tile, int num_rows) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = num_rows > 0 ? 64 : 0;
  }
};
static_assert(sizeof(TileShapes) == 64, "as the CPU reads it");

inline void take_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

// Registers in use make a switch of threads slower: they are given back when nothing is computed.
inline void release_tiles() { asm volatile("tilerelease"); }

// Rows lie one behind another.
template <int tile>
inline void load_tile(const void* memory) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(memory), "r"(int64_t{64}), "i"(tile) : "memory");
}

template <int tile>
inline void store_tile(void* memory) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(memory), "r"(int64_t{64}), "i"(tile) : "memory");
}

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Adds the products of signed bytes in `rows` with signed or unsigned ones in `weights` to 32-bit sums.
template <int sums, int rows, int weights, bool is_signed>
inline void multiply_tiles() {
  if (is_signed) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(weights));
  } else {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(weights));
  }
}

}  // namespace
}  // namespace mixtral

#endif
