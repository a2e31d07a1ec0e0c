// Writing a step's keys and values to their slots, in the form they are held in.
//
// int8: symmetric, one scale per token and head, the largest magnitude becomes 127; rounding is to nearest, ties to
// even. A vector of zeros (or one so small that its scale cannot be inverted) has scale 0. One that is not finite has
// the scale NaN, so that whoever sees it gets NaN.
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"

namespace mixtral {
namespace {

// Nearest, ties to even; NaN stays NaN whatever its low bits are.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct Quantizer {
  float scale, inverse;

  Quantizer(const float* from, int64_t num) {
    float largest = 0.0f;
    float poison = 0.0f;  // becomes NaN if anything is not finite
    for (int64_t i = 0; i < num; ++i) {
      const float magnitude = std::fabs(from[i]);
      largest = magnitude > largest ? magnitude : largest;
      poison += from[i] * 0.0f;
    }
    inverse = 127.0f / largest;
    scale = largest / 127.0f;
    if (poison != poison) {
      scale = std::numeric_limits<float>::quiet_NaN();
      inverse = 0.0f;
    } else if (!(inverse <= std::numeric_limits<float>::max())) {
      scale = inverse = 0.0f;
    }
  }

  int8_t operator()(float value) const {
    return inverse == 0.0f ? int8_t{0} : static_cast<int8_t>(std::lrint(value * inverse));
  }
};

template <typename Element, typename Convert>
void spread(const float* from, int64_t num, Element* to, int64_t stride, const Convert& convert) {
  for (int64_t i = 0; i < num; ++i) to[i * stride] = convert(from[i]);
}

void store_vector(const float* from, int64_t num, const AttentionCall& call, void* storage, int64_t first,
                  int64_t stride, float* scale) {
  switch (call.storage) {
    case Storage::fp32:
      spread(from, num, static_cast<float*>(storage) + first, stride, [](float value) { return value; });
      break;
    case Storage::bf16:
      spread(from, num, static_cast<uint16_t*>(storage) + first, stride, to_bf16);
      break;
    case Storage::int8: {
      const Quantizer quantizer(from, num);
      spread(from, num, static_cast<int8_t*>(storage) + first, stride, quantizer);
      *scale = quantizer.scale;
      break;
    }
  }
}

}  // namespace

void store_rows(const AttentionCall& call, int64_t first, int64_t end) {
  const int64_t dim = call.head_dim;
  const int64_t size = call.block_size;
  for (int64_t head = 0; head < call.num_kv_heads; ++head) {
    for (int64_t row = first; row < end; ++row) {
      const int64_t block = call.slots[row] / size;
      const int64_t offset = call.slots[row] % size;
      const int64_t base = block * call.num_kv_heads + head;
      const float* key = call.key + row * call.key_row_stride + head * call.key_head_stride;
      const float* value = call.value + row * call.value_row_stride + head * call.value_head_stride;
      store_vector(key, dim, call, call.keys, base * dim * size + offset, size, call.key_scales + base * size + offset);
      store_vector(value, dim, call, call.values, (base * size + offset) * dim, 1,
                   call.value_scales + base * size + offset);
    }
  }
}

}  // namespace mixtral
