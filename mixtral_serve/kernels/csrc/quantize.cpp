// Quantising whole matrices: the entry point, and the portable tile.
//
// A tile is packed by one thread and depends on its own rows only, so the bits depend on nothing but the matrix.
#include "quantize.h"

#include <atomic>

#include "cpu.h"
#include "parallel.h"
#include "quantize_rows.h"

namespace mixtral {

bool quantize_tile_portable(const Source& source, const Packed& packed, int64_t tile, float* row) {
  return pack_tile(source, packed, tile, row);
}

namespace {

bool quantize_tile(const Source& source, const Packed& packed, int64_t tile, float* row) {
#if defined(__x86_64__)
  if (active_isa() != Isa::portable) return quantize_tile_avx2(source, packed, tile, row);
#endif
  return quantize_tile_portable(source, packed, tile, row);
}

}  // namespace
}  // namespace mixtral

// Quantises a matrix of fp32 or bf16. `rows` is room for `num_threads` padded rows. Returns 1 if all values are finite,
// else 0; what was written is then of no use.
extern "C" __attribute__((visibility("default"))) int mixtral_quantize(const void* data, int is_bf16, int64_t num_rows,
                                                                       int64_t num_cols, int64_t row_stride,
                                                                       int is_int4, uint8_t* quants, void* scales,
                                                                       float* rows, int num_threads) {
  using namespace mixtral;
  const Source source{data, is_bf16 != 0, num_rows, num_cols, row_stride};
  const Packed packed{is_int4 != 0, quants, scales};
  const int64_t padded = (num_cols + kGroupCols - 1) / kGroupCols * kGroupCols;
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  std::atomic<bool> finite{true};
  parallel(num_threads, [&](Team& team) {
    float* row = rows + team.rank() * padded;
    team.for_each(0, num_tiles, 1, [&](int64_t first, int64_t end) {
      for (int64_t tile = first; tile < end; ++tile) {
        if (!quantize_tile(source, packed, tile, row)) finite.store(false, std::memory_order_relaxed);
      }
    });
  });
  return finite.load() ? 1 : 0;
}
