// What the translation units of the quantiser share.
#pragma once

#include <cstdint>

namespace mixtral {

// A matrix as a checkpoint holds it; rows lie `row_stride` elements apart.
struct Source {
  const void* data;
  bool is_bf16;  // fp32 otherwise
  int64_t num_rows, num_cols, row_stride;
};

// Where its packed form goes; see kernels/formats.py for the layout.
struct Packed {
  bool is_int4;  // int8 otherwise
  uint8_t* quants;
  void* scales;  // fp32 for int8; for int4 sections of fp32 and multipliers
};

// Packs one tile of 16 rows; `row` is room for one padded row. False if a value is not finite.
bool quantize_tile_portable(const Source& source, const Packed& packed, int64_t tile, float* row);
bool quantize_tile_avx2(const Source& source, const Packed& packed, int64_t tile, float* row);

}  // namespace mixtral
