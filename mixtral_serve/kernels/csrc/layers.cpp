// Decoder layers, all of a model in one call: what Transformers' MixtralDecoderLayer does, with the same kernels in the
// same order, so a layer has the same bits as its modules one by one. Between two of them, and between two layers,
// lies no interpreter: threads that wait for the next region are still awake when it comes, and memory is read nearly
// all the time.
//
//   hidden + o(attention(rope(q, k), v))      q, k, v: one product of norm(hidden)
//   then + experts(norm of that)
//
// Rejected: one region for all of it. Threads of a region that follows within microseconds are awake, and cost next to
// nothing.
#include "operations.h"
#include "parallel.h"
#include "scratch.h"

namespace mixtral {
namespace {

constexpr int64_t kThreadWork = 64 << 10;  // numbers that are worth waking a thread

// One layer of what does not change from step to step; sizes are alike in all layers. Structures are mirrored field by
// field by native_layers.py, LayerStorage by native_attention.py.
struct LayerWeights {
  const float* attention_norm;  // [hidden]
  const float* experts_norm;    // [hidden]
  const float* gate;            // [num_experts, hidden]
  PackedWeights q, k, v, o;
  PackedWeights w1, w2, w3;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_chosen;       // experts per row
  int64_t num_inner_tiles;  // tiles of w1 and w3
  float epsilon;
  int32_t kind;
};

// One layer's keys and values; see AttentionCall.
struct LayerStorage {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
};

struct LayersCall {
  const LayerWeights* weights;     // [num_layers]
  const LayerStorage* storage;     // [num_layers]
  const AttentionCall* attention;  // all but the addresses of rows and storage, and the rows' strides
  const float* hidden;             // [num_rows, hidden]
  const float* cosine;             // [num_rows, head_dim]
  const float* sine;               // [num_rows, head_dim]
  float* out;                      // [num_rows, hidden]
  int64_t* chosen;                 // [num_layers, num_rows, num_chosen]: each row's experts; null where nobody asks
  void* scratch;
  int64_t num_layers;
  int64_t pass_rows;  // of products: rows worked on at a time
  int64_t num_threads;
};

class Layers {
 public:
  Layers(const LayersCall& call, char* memory)
      : call_(call), weights_(call.weights), attention_(*call.attention), num_rows_(attention_.num_rows),
        query_size_(attention_.num_query_heads * attention_.head_dim),
        key_size_(attention_.num_kv_heads * attention_.head_dim) {
    Scratch scratch(memory);
    normed_ = scratch.take<float>(num_rows_ * weights_->hidden_size);
    added_ = scratch.take<float>(num_rows_ * weights_->hidden_size);
    query_ = scratch.take<float>(num_rows_ * query_size_);
    attended_ = scratch.take<float>(num_rows_ * query_size_);
    key_ = scratch.take<float>(num_rows_ * key_size_);
    value_ = scratch.take<float>(num_rows_ * key_size_);
    logits_ = scratch.take<float>(num_rows_ * weights_->num_experts);
    shares_ = scratch.take<float>(num_rows_ * weights_->num_chosen);
    chosen_ = scratch.take<int64_t>(num_rows_ * weights_->num_chosen);
    products_ = scratch.take<char>(products_bytes());
    end_ = scratch.take<char>(0);
  }

  int64_t scratch_bytes() const { return end_ - static_cast<char*>(nullptr); }

  int run() {
    for (int64_t layer = 0; layer < call_.num_layers; ++layer) {
      weights_ = call_.weights + layer;
      if (call_.chosen) chosen_ = call_.chosen + layer * num_rows_ * weights_->num_chosen;
      const int error = run_layer(call_.storage[layer], layer == 0 ? call_.hidden : call_.out);
      if (error != 0) return error;
    }
    return 0;
  }

 private:
  // From `hidden`, which may be the call's out, to out.
  int run_layer(const LayerStorage& storage, const float* hidden) {
    const LayerWeights& w = *weights_;
    norm(hidden, w.attention_norm);
    project_in();
    rotate(query_, attention_.num_query_heads);
    rotate(key_, attention_.num_kv_heads);
    const int error = attend(storage);
    if (error != 0) return error;
    project_out();
    add(hidden);
    norm(call_.out, w.experts_norm);
    mixtral_route(normed_, w.gate, logits_, shares_, chosen_, num_rows_, w.hidden_size, w.num_experts, w.num_chosen,
                  call_.num_threads);
    experts();
    add(call_.out);
    return 0;
  }

  int64_t products_bytes() const {
    const int64_t rows = num_rows_ < call_.pass_rows ? num_rows_ : call_.pass_rows;
    const int64_t widest = query_size_ > weights_->hidden_size ? query_size_ : weights_->hidden_size;
    const int64_t linear = mixtral_linear_scratch_bytes(rows, widest, weights_->kind);
    const int64_t experts =
        mixtral_experts_scratch_bytes(rows, weights_->hidden_size, weights_->num_chosen, weights_->num_experts,
                                      weights_->num_inner_tiles, weights_->kind);
    return linear > experts ? linear : experts;
  }

  // body(first row, number of rows) for one pass after the other.
  template <typename Body>
  void for_each_pass(const Body& body) const {
    for (int64_t first = 0; first < num_rows_; first += call_.pass_rows) {
      body(first, num_rows_ - first < call_.pass_rows ? num_rows_ - first : call_.pass_rows);
    }
  }

  // body(row) for all rows, on as many threads as `row_work` numbers per row are worth.
  template <typename Body>
  void for_each_row(int64_t row_work, const Body& body) const {
    const int64_t threads = 1 + num_rows_ * row_work / kThreadWork;
    parallel(static_cast<int>(threads < call_.num_threads ? threads : call_.num_threads), [&](Team& team) {
      team.for_each(0, num_rows_, 1, [&](int64_t row, int64_t) { body(row); });
    });
  }

  void norm(const float* x, const float* weight) const {
    mixtral_rms_norm(x, weight, normed_, num_rows_, weights_->hidden_size, weights_->epsilon, call_.num_threads);
  }

  LinearRows linear_rows(const float* x, int64_t num_cols, int64_t first, int64_t count) const {
    return {x + first * num_cols, products_, count, num_cols, static_cast<Kind>(weights_->kind),
            static_cast<int>(call_.num_threads)};
  }

  void project_in() const {
    for_each_pass([&](int64_t first, int64_t count) {
      const Factor factors[] = {{weights_->q, query_ + first * query_size_, query_size_},
                                {weights_->k, key_ + first * key_size_, key_size_},
                                {weights_->v, value_ + first * key_size_, key_size_}};
      multiply_rows(linear_rows(normed_, weights_->hidden_size, first, count), factors, 3);
    });
  }

  void project_out() const {
    for_each_pass([&](int64_t first, int64_t count) {
      const Factor factor{weights_->o, added_ + first * weights_->hidden_size, weights_->hidden_size};
      multiply_rows(linear_rows(attended_, query_size_, first, count), &factor, 1);
    });
  }

  // Each number with its partner half a head away, as Transformers pairs them; products and sum are rounded apart.
  void rotate(float* x, int64_t num_heads) const {
    const int64_t dim = attention_.head_dim, half = dim / 2;
    for_each_row(num_heads * dim, [&](int64_t row) {
      const float* cosine = call_.cosine + row * dim;
      const float* sine = call_.sine + row * dim;
      for (int64_t head = 0; head < num_heads; ++head) {
        float* low = x + (row * num_heads + head) * dim;
        float* high = low + half;
        for (int64_t i = 0; i < half; ++i) {
          const float a = low[i], b = high[i];
          low[i] = a * cosine[i] - b * sine[i];
          high[i] = b * cosine[half + i] + a * sine[half + i];
        }
      }
    });
  }

  int attend(const LayerStorage& storage) const {
    AttentionCall attention = attention_;
    attention.keys = storage.keys;
    attention.values = storage.values;
    attention.key_scales = storage.key_scales;
    attention.value_scales = storage.value_scales;
    attention.query = query_;
    attention.key = key_;
    attention.value = value_;
    attention.out = attended_;
    attention.query_row_stride = query_size_;
    attention.key_row_stride = attention.value_row_stride = key_size_;
    attention.query_head_stride = attention.key_head_stride = attention.value_head_stride = attention_.head_dim;
    return mixtral_paged_attention(&attention);
  }

  void experts() const {
    const LayerWeights& w = *weights_;
    for_each_pass([&](int64_t first, int64_t count) {
      const ExpertsCall call{normed_ + first * w.hidden_size, chosen_ + first * w.num_chosen,
                             shares_ + first * w.num_chosen, w.w1, w.w2, w.w3, added_ + first * w.hidden_size,
                             products_, count, w.hidden_size, w.num_chosen, w.num_experts, w.num_inner_tiles, w.kind,
                             static_cast<int32_t>(call_.num_threads)};
      mixtral_experts(&call);  // the router names only experts that there are
    });
  }

  // out = residual + what was computed
  void add(const float* residual) const {
    const int64_t width = weights_->hidden_size;
    for_each_row(width, [&](int64_t row) {
      for (int64_t i = row * width; i < (row + 1) * width; ++i) call_.out[i] = residual[i] + added_[i];
    });
  }

  const LayersCall& call_;
  const LayerWeights* weights_;  // of the layer at hand
  const AttentionCall& attention_;
  const int64_t num_rows_, query_size_, key_size_;
  float *normed_, *added_, *query_, *attended_, *key_, *value_, *logits_, *shares_;
  int64_t* chosen_;
  char *products_, *end_;
};

}  // namespace
}  // namespace mixtral

extern "C" {

// Bytes of LayersCall.scratch; of the call everything but the tensors must be filled in.
__attribute__((visibility("default"))) int64_t mixtral_layers_scratch_bytes(const mixtral::LayersCall* call) {
  return mixtral::Layers(*call, nullptr).scratch_bytes();
}

// 0, or what is wrong with the attention's step, as mixtral_paged_attention says.
__attribute__((visibility("default"))) int mixtral_layers(const mixtral::LayersCall* call) {
  return call->attention->num_rows > 0 ? mixtral::Layers(*call, static_cast<char*>(call->scratch)).run() : 0;
}
}
