// The tile of the quantiser, compiled for AVX2. Multiplications and additions are never fused (-ffp-contract=off).
#if defined(__x86_64__)

#include <cstdint>

#include "quantize.h"

#pragma GCC push_options
#pragma GCC target("avx2")
#include "quantize_rows.h"

namespace mixtral {

bool quantize_tile_avx2(const Source& source, const Packed& packed, int64_t tile, float* row) {
  return pack_tile(source, packed, tile, row);
}

}  // namespace mixtral
#pragma GCC pop_options

#endif
