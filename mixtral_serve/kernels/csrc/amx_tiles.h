// AMX's tile registers: eight, of up to sixteen rows of 64 bytes.
//
// The instructions are written byte by byte, with memory at rax and its rows rcx bytes apart: some compilers' intrinsics
// say nothing of the memory they read, so that stores to it are left out or come too late, and assemblers in use (before
// binutils 2.36) do not know their names.
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

inline void take_tiles(const TileShapes& shapes) {
  asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00  # ldtilecfg (%%rax)" : : "a"(&shapes), "m"(shapes));
}

// Registers in use make a switch of threads slower: they are given back when nothing is computed.
inline void release_tiles() { asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0  # tilerelease"); }

// Rows lie one behind another.
template <int tile>
inline void load_tile(const void* memory) {
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, %c2, 0x08  # tileloadd (%%rax,%%rcx)"
               :
               : "a"(memory), "c"(int64_t{64}), "i"(tile << 3 | 4)
               : "memory");
}

template <int tile>
inline void store_tile(void* memory) {
  asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, %c2, 0x08  # tilestored (%%rax,%%rcx)"
               :
               : "a"(memory), "c"(int64_t{64}), "i"(tile << 3 | 4)
               : "memory");
}

template <int tile>
inline void zero_tile() {
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, %c0  # tilezero" : : "i"(0xc0 | tile << 3));
}

// Adds the products of signed bytes in `rows` with signed or unsigned ones in `weights` to 32-bit sums.
template <int sums, int rows, int weights, bool is_signed>
inline void multiply_tiles() {
  constexpr int kRegister = (~weights & 15) << 3, kSigned = 3, kUnsigned = 2;
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5e, %c1  # tdpbssd, tdpbsud"
               :
               : "i"(kRegister | (is_signed ? kSigned : kUnsigned)), "i"(0xc0 | sums << 3 | rows));
}

}  // namespace
}  // namespace mixtral

#endif
