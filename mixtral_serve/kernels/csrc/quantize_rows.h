// Quantising one tile of 16 rows, written once and compiled for each instruction set.
//
// Included inside a translation unit's own target pragma, hence no standard templates and everything in an anonymous
// namespace: no function compiled for a better CPU can be picked by the linker for all. Only +, -, *, / and
// comparisons are used, in a fixed order and never fused, so that the bits are those of kernels/formats.py.
#pragma once

#include "quantize.h"

namespace mixtral {
namespace {

constexpr int kTileRows = 16;
constexpr int kGroupCols = 32;
constexpr int kSectionGroups = 128;
constexpr float kMaxMultiplier = 127.0f;
// What the largest value of a group is divided by: the scales that are tried. The first wins among equals.
constexpr int kNumTried = 5;
constexpr float kDivisors[kNumTried] = {-8.0f, -7.5f, -7.0f, -8.5f, 7.5f};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// Added and taken away again, it rounds |value| < 2^22 half to even: beside it a float has no bits for fractions.
constexpr float kRoundEven = 12582912.0f;

inline float clamped(float value, float least, float most) {
  const float lower = value < least ? least : value;
  return lower > most ? most : lower;
}

// `count` values from `source`, zeros up to `padded`; false if one of them is not finite.
inline bool read_values(const Source& source, int64_t at, int64_t count, int64_t padded, float* out) {
  uint32_t largest = 0;
  if (source.is_bf16) {
    const auto* from = static_cast<const uint16_t*>(source.data) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(from[i]);
  } else {
    const auto* from = static_cast<const float*>(source.data) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = from[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t exponent = float_to_bits(out[i]) & 0x7f800000u;
    largest = exponent > largest ? exponent : largest;
  }
  for (int64_t i = count; i < padded; ++i) out[i] = 0.0f;
  return largest != 0x7f800000u;
}

// Eight values side by side; the compiler makes of it what the instruction set has.
typedef float Vec __attribute__((vector_size(32)));
constexpr int kVecs = kGroupCols / 8;

// A group of 32.
struct Group {
  Vec at[kVecs];
};

// Sum of 32 values in a fixed order: halves are added to each other until one value is left.
inline float sum_group(const Group& group) {
  const Vec eight = (group.at[0] + group.at[2]) + (group.at[1] + group.at[3]);
  const float a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6], d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

// What values are multiplied by instead of divided by `scale`; 0 where that would overflow (all is zero there).
inline float inverse(float scale) {
  const float result = 1.0f / scale;
  return result - result == 0.0f ? result : 0.0f;
}

inline void round_group(const Group& group, float scale, Group* out) {
  const float factor = inverse(scale);
  const Vec zero = {}, least = zero - 8.0f, most = zero + 7.0f;
  for (int i = 0; i < kVecs; ++i) {
    const Vec value = group.at[i] * factor;
    const Vec lower = value < least ? least : value;
    const Vec inside = lower > most ? most : lower;
    out->at[i] = (inside + kRoundEven) - kRoundEven;
  }
}

// The scale of `group` fitted by least squares to the values that `scale` rounds it to.
inline float fit_scale(const Group& group, float scale) {
  Group values, squares, products;
  round_group(group, scale, &values);
  for (int i = 0; i < kVecs; ++i) {
    squares.at[i] = values.at[i] * values.at[i];
    products.at[i] = group.at[i] * values.at[i];
  }
  const float square = sum_group(squares);
  return square > 0.0f ? sum_group(products) / square : scale;
}

inline float squared_error(const Group& group, float scale) {
  Group values;
  round_group(group, scale, &values);
  for (int i = 0; i < kVecs; ++i) {
    const Vec error = group.at[i] - values.at[i] * scale;
    values.at[i] = error * error;
  }
  return sum_group(values);
}

// Of the values, the one of largest magnitude; the positive one of two.
inline float largest_of(const float* values) {
  float least = values[0], most = values[0];
  for (int i = 1; i < kGroupCols; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  return most >= -least ? most : least;
}

// Stage by stage over all that is tried: each is a long chain of dependent operations, and side by side they overlap.
inline float best_scale(const Group& group, float largest) {
  float scales[kNumTried], errors[kNumTried];
  for (int i = 0; i < kNumTried; ++i) scales[i] = largest / kDivisors[i];
  float best = scales[0], best_error = __builtin_inff();
  for (int i = 0; i < kNumTried; ++i) scales[i] = fit_scale(group, scales[i]);
  for (int i = 0; i < kNumTried; ++i) errors[i] = squared_error(group, scales[i]);
  for (int i = 0; i < kNumTried; ++i) {
    const uint32_t better = -static_cast<uint32_t>(errors[i] < best_error);  // a mask: nobody predicts this branch
    best = bits_to_float((float_to_bits(scales[i]) & better) | (float_to_bits(best) & ~better));
    best_error = errors[i] < best_error ? errors[i] : best_error;
  }
  return best;
}

// `scale` as a multiple of `unit`, whose inverse is `factor`: never zero for what is not zero.
inline int to_multiplier(float scale, float factor) {
  const float magnitude = scale < 0.0f ? -scale : scale;
  const float rounded = (clamped(magnitude * factor, 1.0f, kMaxMultiplier) + kRoundEven) - kRoundEven;
  return magnitude == 0.0f ? 0 : static_cast<int>(scale < 0.0f ? -rounded : rounded);
}

// Row `in_tile` of one group's 256 bytes.
inline void put_nibbles(const Group& rounded, int in_tile, uint8_t* group) {
  float values[kGroupCols];
  __builtin_memcpy(values, &rounded, sizeof values);
  for (int line = 0; line < 4; ++line) {
    uint8_t* to = group + line * 64 + 4 * in_tile;
    for (int j = 0; j < 4; ++j) {
      const int low = static_cast<int>(values[8 * line + j]) + 8, high = static_cast<int>(values[8 * line + j + 4]) + 8;
      to[j] = static_cast<uint8_t>(low | (high << 4));
    }
  }
}

// One row of a section: 16 bytes of each group's 256, one of 16 scales, and one of each group's 16 multipliers.
inline void pack_int4_section(const float* row, int num_groups, int in_tile, uint8_t* quants, uint8_t* scales) {
  float best[kSectionGroups], peak = 0.0f;
  for (int group = 0; group < num_groups; ++group) {
    Group from;
    __builtin_memcpy(&from, row + group * kGroupCols, sizeof from);
    best[group] = best_scale(from, largest_of(row + group * kGroupCols));
    const float magnitude = best[group] < 0.0f ? -best[group] : best[group];
    peak = magnitude > peak ? magnitude : peak;
  }
  const float unit = peak / kMaxMultiplier, factor = inverse(unit);
  __builtin_memcpy(scales + sizeof unit * in_tile, &unit, sizeof unit);
  uint8_t* multipliers = scales + sizeof unit * kTileRows;
  for (int group = 0; group < num_groups; ++group) {
    Group from, rounded;
    __builtin_memcpy(&from, row + group * kGroupCols, sizeof from);
    const int multiplier = to_multiplier(best[group], factor);
    multipliers[group * kTileRows + in_tile] = static_cast<uint8_t>(multiplier);
    round_group(from, static_cast<float>(multiplier) * unit, &rounded);
    put_nibbles(rounded, in_tile, quants + group * 256);
  }
}

inline void pack_int4_row(const float* row, int64_t num_groups, int in_tile, uint8_t* quants, uint8_t* scales) {
  constexpr int64_t kSectionBytes = kTileRows * (sizeof(float) + kSectionGroups);
  for (int64_t first = 0; first < num_groups; first += kSectionGroups, scales += kSectionBytes) {
    const int64_t left = num_groups - first;
    pack_int4_section(row + first * kGroupCols, static_cast<int>(left < kSectionGroups ? left : kSectionGroups), in_tile,
                      quants + first * 256, scales);
  }
}

inline void pack_int8_row(const float* row, int64_t num_cols, int in_tile, uint8_t* quants, float* scale) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < num_cols; ++i) {
    const uint32_t magnitude = float_to_bits(row[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = bits_to_float(largest) / 127.0f;
  const float factor = inverse(*scale);
  for (int64_t line = 0; line < num_cols / 4; ++line) {
    uint8_t* to = quants + line * 64 + 4 * in_tile;
    for (int j = 0; j < 4; ++j) {
      const float value = (clamped(row[4 * line + j] * factor, -127.0f, 127.0f) + kRoundEven) - kRoundEven;
      to[j] = static_cast<uint8_t>(static_cast<int>(value) + 128);
    }
  }
}

// Tile `tile` of the matrix; rows beyond its end are zero. False if a value is not finite.
inline bool pack_tile(const Source& source, const Packed& packed, int64_t tile, float* row) {
  const int64_t padded = (source.num_cols + kGroupCols - 1) / kGroupCols * kGroupCols;
  const int64_t num_groups = padded / kGroupCols;
  bool finite = true;
  for (int in_tile = 0; in_tile < kTileRows; ++in_tile) {
    const int64_t at = tile * kTileRows + in_tile;
    const int64_t count = at < source.num_rows ? source.num_cols : 0;
    if (!read_values(source, at * source.row_stride, count, padded, row)) {
      finite = false;  // and the row is left out: a NaN has no integer
    } else if (packed.is_int4) {
      const int64_t num_sections = (num_groups + kSectionGroups - 1) / kSectionGroups;
      const int64_t scale_bytes = kTileRows * (num_sections * static_cast<int64_t>(sizeof(float)) + num_groups);
      pack_int4_row(row, num_groups, in_tile, packed.quants + tile * num_groups * 256,
                    static_cast<uint8_t*>(packed.scales) + tile * scale_bytes);
    } else {
      pack_int8_row(row, padded, in_tile, packed.quants + tile * padded * kTileRows,
                    static_cast<float*>(packed.scales) + tile * kTileRows + in_tile);
    }
  }
  return finite;
}

}  // namespace
}  // namespace mixtral
