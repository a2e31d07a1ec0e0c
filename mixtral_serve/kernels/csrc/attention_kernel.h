// Attention of one piece, written once for all instruction sets.
//
// Included by the translation units that define Lanes (sixteen floats and what can be done with them), each of which
// compiles it for its own instruction set; everything stays internal to that unit. See attention.h for the order of
// operations, which is what makes the bits.
//
// Scores and weighted values are the same small product (attention_product.h). Where many rows share the keys, a tile
// is first converted to fp32, keys in the order [dimension][key], values in the order [key][dimension], in a buffer
// that the first-level cache holds; where few do (decodes), the product converts what it reads.
#pragma once

#include "attention.h"
#include "attention_product.h"

namespace mixtral {
namespace {

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// What the rows of a piece have gathered, and room to work in.
struct Workspace {
  float* tile;
  float* queries;  // [rows, head_dim]
  float* weights;  // [rows, kTileKeys]: scores, then weights
  float* sums;     // [rows, kLanes]: sums of weights by position modulo kLanes
  float* part;     // [rows, partial_floats]: of the split at hand
  float* total;    // [rows, partial_floats]: of the splits before it
  float* key_scales;
  float* value_scales;

  Workspace(float* base, int64_t head_dim) {
    tile = base;
    queries = tile + round_up(head_dim, kLanes) * kTileKeys;
    weights = queries + kMaxPieceRows * round_up(head_dim, kLanes);
    sums = weights + kMaxPieceRows * kTileKeys;
    part = sums + kMaxPieceRows * kLanes;
    total = part + kMaxPieceRows * partial_floats(head_dim);
    key_scales = total + kMaxPieceRows * partial_floats(head_dim);
    value_scales = key_scales + kTileKeys;
  }
};

template <typename Element>
class PieceKernel {
 public:
  PieceKernel(const AttentionCall& call, const Piece& piece, int64_t kv_head, float* workspace)
      : call_(call),
        piece_(piece),
        kv_head_(kv_head),
        per_kv_head_(call.num_query_heads / call.num_kv_heads),
        dim_(call.head_dim),
        padded_(round_up(call.head_dim, kLanes)),
        stride_(partial_floats(call.head_dim)),
        is_direct_(piece.num_rows <= kMaxRows && call.head_dim % kLanes == 0 && call.block_size % kLanes == 0),
        work_(workspace, call.head_dim) {}

  void run() {
    read_queries();
    if (piece_.split >= 0) {
      const int64_t head = kv_head_ * per_kv_head_ + piece_.first_row;
      work_.part = call_.partials + (piece_.partial * call_.num_query_heads + head) * stride_;
      run_split(piece_.split);
      return;
    }
    const int64_t first = first_key(0) / kSplitKeys;
    const int64_t end = (end_key(piece_.num_rows - 1) + kSplitKeys - 1) / kSplitKeys;
    for (int64_t split = first; split < end; ++split) {
      run_split(split);
      for (int64_t row = 0; row < piece_.num_rows; ++row) {
        if (!sees(row, split * kSplitKeys, (split + 1) * kSplitKeys)) continue;
        float* total = work_.total + row * stride_;
        if (first_key(row) / kSplitKeys == split) {
          copy_result(work_.part + row * stride_, total);
        } else {
          combine(total, work_.part + row * stride_, padded_);
        }
      }
    }
    for (int64_t row = 0; row < piece_.num_rows; ++row) {
      normalise(work_.total + row * stride_, padded_, dim_, call_.out + place(row, dim_ * call_.num_query_heads, dim_));
    }
  }

  // total := total and then part.
  static void combine(float* total, const float* part, int64_t padded) {
    const float largest = total[padded] > part[padded] ? total[padded] : part[padded];
    const Lanes before = exponential(broadcast(total[padded] - largest));
    const Lanes now = exponential(broadcast(part[padded] - largest));
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(total + i, fused(load(part + i), now, times(load(total + i), before)));
    }
    total[padded + 1] = __builtin_fmaf(part[padded + 1], first_of(now), total[padded + 1] * first_of(before));
    total[padded] = largest;
  }

  static void normalise(float* total, int64_t padded, int64_t dim, float* out) {
    const Lanes sum = broadcast(total[padded + 1]);
    for (int64_t i = 0; i < padded; i += kLanes) store(total + i, over(load(total + i), sum));
    __builtin_memcpy(out, total, static_cast<size_t>(dim) * sizeof(float));
  }

 private:
  int64_t position(int64_t row) const { return piece_.start + (piece_.first_row + row) / per_kv_head_; }
  int64_t first_key(int64_t row) const { return call_.window ? greater(0, position(row) - call_.window + 1) : 0; }
  int64_t end_key(int64_t row) const { return position(row) + 1; }
  bool sees(int64_t row, int64_t begin, int64_t end) const { return first_key(row) < end && begin < end_key(row); }

  // Where a row's vector lies in a tensor with these strides.
  int64_t place(int64_t row, int64_t row_stride, int64_t head_stride) const {
    const int64_t at = piece_.first_row + row;
    const int64_t head = kv_head_ * per_kv_head_ + at % per_kv_head_;
    return (piece_.first_slice_row + at / per_kv_head_) * row_stride + head * head_stride;
  }

  void copy_result(const float* from, float* to) const {
    __builtin_memcpy(to, from, static_cast<size_t>(stride_) * sizeof(float));
  }

  void read_queries() {
    for (int64_t row = 0; row < piece_.num_rows; ++row) {
      const float* from = call_.query + place(row, call_.query_row_stride, call_.query_head_stride);
      __builtin_memcpy(work_.queries + row * dim_, from, static_cast<size_t>(dim_) * sizeof(float));
    }
  }

  void run_split(int64_t split) {
    for (int64_t row = 0; row < piece_.num_rows; ++row) {
      float* part = work_.part + row * stride_;
      for (int64_t i = 0; i < padded_; i += kLanes) store(part + i, broadcast(0.0f));
      part[padded_] = -__builtin_inff();
      store(work_.sums + row * kLanes, broadcast(0.0f));
    }
    const int64_t begin = greater(split * kSplitKeys, first_key(0) / kTileKeys * kTileKeys);
    const int64_t end = lesser((split + 1) * kSplitKeys, end_key(piece_.num_rows - 1));
    for (int64_t tile = begin; tile < end; tile += kTileKeys) run_tile(tile, lesser(tile + kTileKeys, end));
    for (int64_t row = 0; row < piece_.num_rows; ++row) {
      work_.part[row * stride_ + padded_ + 1] = sum_of(load(work_.sums + row * kLanes));
    }
  }

  // Keys [tile, end) of the context; the rows see some of them.
  void run_tile(int64_t tile, int64_t end) {
    const int64_t begin = greater(tile, first_key(0));
    if (is_quantised()) read_scales(tile, begin, end);
    if (is_direct_) {
      score_directly(tile, begin, end);
    } else {
      read_keys(tile, begin, end);
      for (int64_t row = 0; row < piece_.num_rows; row += kMaxRows) {
        const int64_t rows = lesser(kMaxRows, piece_.num_rows - row);
        product_of(rows, work_.queries + row * dim_, dim_, work_.tile, kTileKeys, kLanes, dim_,
                   work_.weights + row * kTileKeys, kTileKeys, kTileKeys, true);
      }
      read_values(tile, begin, end);
    }
    for (int64_t row = 0; row < piece_.num_rows; ++row) {
      if (sees(row, tile, end)) weigh(row, greater(begin, first_key(row)) - tile, lesser(end, end_key(row)) - tile);
    }
    for (int64_t row = 0; row < piece_.num_rows; row += kMaxRows) {
      add_values(tile, end, row, lesser(kMaxRows, piece_.num_rows - row));
    }
  }

  // Scores of one row to weights, for the keys [from, to) of the tile.
  void weigh(int64_t row, int64_t from, int64_t to) {
    float* weights = work_.weights + row * kTileKeys;
    float* part = work_.part + row * stride_;
    const Lanes scaling = broadcast(static_cast<float>(call_.scaling));
    const Lanes lowest = broadcast(-__builtin_inff());
    Lanes scores[kTileKeys / kLanes];
    Lanes largest = lowest;
    for (int i = 0; i < kTileKeys / kLanes; ++i) {
      Lanes score = load(weights + i * kLanes);
      if (is_quantised()) score = times(score, load(work_.key_scales + i * kLanes));
      scores[i] = within(times(score, scaling), lowest, from - i * kLanes, to - i * kLanes);
      largest = larger(scores[i], largest);
    }
    const float before = part[padded_];
    const float now = largest_of(largest);
    Lanes sums = load(work_.sums + row * kLanes);
    if (!(now <= before)) {  // or NaN, which then spreads
      const Lanes shrink = exponential(broadcast(before - now));
      for (int64_t i = 0; i < padded_; i += kLanes) store(part + i, times(load(part + i), shrink));
      sums = times(sums, shrink);
      part[padded_] = now;
    }
    const Lanes top = broadcast(part[padded_]);
    for (int i = 0; i < kTileKeys / kLanes; ++i) {
      Lanes weight = exponential(minus(scores[i], top));
      weight = within(weight, broadcast(0.0f), from - i * kLanes, to - i * kLanes);
      sums = plus(sums, weight);
      if (is_quantised()) weight = times(weight, load(work_.value_scales + i * kLanes));
      store(weights + i * kLanes, weight);
    }
    store(work_.sums + row * kLanes, sums);
  }

  // Adds the weighted values of the tile to a few rows: the keys that all of them see in one product, others row by
  // row.
  void add_values(int64_t tile, int64_t end, int64_t first, int64_t rows) {
    const int64_t all_from = greater(tile, first_key(first + rows - 1));
    const int64_t all_to = lesser(end, end_key(first));
    const bool is_shared = all_from < all_to && rows > 1;
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t from = greater(tile, first_key(row));
      const int64_t to = lesser(end, end_key(row));
      add_keys(tile, row, 1, from, is_shared ? all_from : to);
    }
    if (!is_shared) return;
    add_keys(tile, first, rows, all_from, all_to);
    for (int64_t row = first; row < first + rows; ++row) add_keys(tile, row, 1, all_to, lesser(end, end_key(row)));
  }

  void add_keys(int64_t tile, int64_t row, int64_t rows, int64_t from, int64_t to) {
    if (from >= to) return;
    float* part = work_.part + row * stride_;
    const float* weights = work_.weights + row * kTileKeys - tile;
    if (!is_direct_) {
      const float* values = work_.tile + (from - tile) * padded_;
      product_of(rows, weights + from, kTileKeys, values, padded_, kLanes, to - from, part, stride_, padded_, false);
      return;
    }
    for (int64_t at = from; at < to; at = at / kLanes * kLanes + kLanes) {
      const int64_t num = lesser(to, at / kLanes * kLanes + kLanes) - at;
      product_of(rows, weights + at, kTileKeys, values_at(at), dim_, kLanes, num, part, stride_, dim_, false,
                 upcoming_keys(at + kTileKeys, values_at(at)));
    }
  }

  // Scores straight from the storage; meanwhile memory is asked for the values.
  void score_directly(int64_t tile, int64_t begin, int64_t end) {
    const int64_t first = begin / kLanes * kLanes;
    const Element *keys = keys_at(first), *values = values_at(first);
    const bool is_pair = first + kLanes < end;
    const int64_t step = is_pair ? keys_at(first + kLanes) - keys : 0;
    const int64_t values_step = is_pair ? values_at(first + kLanes) - values : 0;
    product_of(piece_.num_rows, work_.queries, dim_, keys, call_.block_size, step, dim_, work_.weights + (first - tile),
               kTileKeys, is_pair ? kTileKeys : kLanes, true, Upcoming<Element>{values, kLanes, values_step});
  }

  // The sixteen keys around a position, which a product of as many values asks for; if there are none, the values,
  // which are here already.
  Upcoming<Element> upcoming_keys(int64_t at, const Element* here) const {
    if (at >= end_key(piece_.num_rows - 1)) return {here, 0, 0};
    return {keys_at(at / kLanes * kLanes), call_.block_size, kLanes * call_.block_size};
  }

  // Vectors of kLanes elements in a cache line.
  static constexpr int64_t kLineVectors = 64 / (kLanes * static_cast<int64_t>(sizeof(Element)));

  static constexpr bool is_quantised() { return sizeof(Element) == 1; }

  // The block that holds a position, counted in key heads.
  int64_t base(int64_t at) const {
    return call_.tables[piece_.table + at / call_.block_size] * call_.num_kv_heads + kv_head_;
  }

  const Element* keys_at(int64_t at) const {
    return static_cast<const Element*>(call_.keys) + base(at) * dim_ * call_.block_size + at % call_.block_size;
  }

  const Element* values_at(int64_t at) const {
    return static_cast<const Element*>(call_.values) + (base(at) * call_.block_size + at % call_.block_size) * dim_;
  }

  void read_keys(int64_t tile, int64_t begin, int64_t end) {
    const int64_t size = call_.block_size;
    if (size % kLanes == 0) {
      for (int64_t at = begin / kLanes * kLanes; at < end; at += kLanes) {
        const Element* from = keys_at(at);
        const Element* ahead = values_at(at);
        float* to = work_.tile + (at - tile);
        for (int64_t i = 0; i < dim_; ++i) {
          if (i % kLineVectors == 0) __builtin_prefetch(ahead + i * kLanes, 0, 2);
          store(to + i * kTileKeys, load_as(from + i * size));
        }
      }
    } else {
      for (int64_t at = begin; at < end; ++at) {
        const Element* from = keys_at(at);
        float* to = work_.tile + (at - tile);
        for (int64_t i = 0; i < dim_; ++i) to[i * kTileKeys] = one_as(from[i * size]);
      }
    }
  }

  // Of the keys and values [begin, end) of a tile; memory is asked for those of the next tile.
  void read_scales(int64_t tile, int64_t begin, int64_t end) {
    const int64_t size = call_.block_size;
    const auto copy = [](const float* from, int64_t count, float* to) {
      __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    };
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t offset = at % size, from = base(at) * size + offset;
      count = lesser(end - at, size - offset);
      copy(call_.key_scales + from, count, work_.key_scales + at - tile);
      copy(call_.value_scales + from, count, work_.value_scales + at - tile);
    }
    for (int64_t at = tile + kTileKeys; at < lesser(tile + 2 * kTileKeys, end_key(piece_.num_rows - 1)); at += kLanes) {
      const int64_t from = base(at) * size + at % size;
      __builtin_prefetch(call_.key_scales + from);
      __builtin_prefetch(call_.value_scales + from);
    }
  }

  // A sixteenth of the dimensions of the sixteen keys around a position: memory answers while this tile is computed.
  void prefetch_keys(int64_t at) const {
    const int64_t size = call_.block_size;
    if (at >= end_key(piece_.num_rows - 1) || size % kLanes != 0) return;
    const Element* keys = keys_at(at / kLanes * kLanes);
    const int64_t step = greater(1, kLineVectors * kLanes / size);
    const int64_t end = dim_ * (at % kLanes + 1) / kLanes;
    for (int64_t i = dim_ * (at % kLanes) / kLanes; i < end; i += step) __builtin_prefetch(keys + i * size, 0, 2);
  }

  void read_values(int64_t tile, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Element* from = values_at(at);
      float* to = work_.tile + (at - tile) * padded_;
      prefetch_keys(at + kTileKeys);
      int64_t i = 0;
      for (; i + kLanes <= dim_; i += kLanes) store(to + i, load_as(from + i));
      for (; i < dim_; ++i) to[i] = one_as(from[i]);
      for (; i < padded_; ++i) to[i] = 0.0f;
    }
  }

  const AttentionCall& call_;
  const Piece& piece_;
  const int64_t kv_head_, per_kv_head_, dim_, padded_, stride_;
  const bool is_direct_;  // read from the storage, without a tile
  Workspace work_;
};

void attend(const AttentionCall& call, const Piece& piece, int64_t kv_head, float* workspace) {
  switch (call.storage) {
    case Storage::fp32:
      PieceKernel<float>(call, piece, kv_head, workspace).run();
      break;
    case Storage::bf16:
      PieceKernel<uint16_t>(call, piece, kv_head, workspace).run();
      break;
    case Storage::int8:
      PieceKernel<int8_t>(call, piece, kv_head, workspace).run();
      break;
  }
}

void merge(const AttentionCall& call, const Merge& merge, int64_t query_head, float*) {
  const int64_t stride = partial_floats(call.head_dim);
  const int64_t padded = round_up(call.head_dim, kLanes);
  float* total = call.partials + (merge.first_partial * call.num_query_heads + query_head) * stride;
  for (int64_t i = 1; i < merge.num_partials; ++i) {
    PieceKernel<float>::combine(total, total + i * call.num_query_heads * stride, padded);
  }
  float* out = call.out + (merge.row * call.num_query_heads + query_head) * call.head_dim;
  PieceKernel<float>::normalise(total, padded, call.head_dim, out);
}

}  // namespace
}  // namespace mixtral
