// The next token of each row: the most likely one, or one drawn from the whole vocabulary or from what filters leave.
// model/sampler.py says what the filters mean, and model/draws.py how a token is drawn. A row is worked on while it
// lies in a cache, by one thread.
//
// The whole vocabulary is drawn from without its exponentials: of each chunk only that of the largest number is
// computed, which bounds the others.
//
// Rejected: inverting the cumulative distribution of the whole vocabulary (thirty times as many exponentials).
#include "choice.h"

#include <cmath>

#include "math.h"
#include "parallel.h"

namespace mixtral {
namespace {

constexpr int64_t kThreadWork = 64 << 10;  // numbers that are worth waking a thread
constexpr int64_t kMostTrials = 8192;  // of which each accepts once in 64 times or more often

struct ChoiceCall {
  const float* logits;  // [num_rows, width]
  const Asked* asked;   // [num_rows]
  int64_t* tokens;      // [num_rows]
  void* scratch;        // num_threads times mixtral_choice_scratch_bytes(width)
  int64_t num_rows, width;
  int64_t is_raw;  // 1: minus infinity is a fault, as NaN is; 0: it is a token that is forbidden
};

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), begun at `state`.
class Words {
 public:
  explicit Words(uint64_t state) : state_(state) {}

  uint64_t next() {
    uint64_t word = state_ += 0x9e3779b97f4a7c15u;
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
    return word ^ (word >> 31);
  }

 private:
  uint64_t state_;
};

// The upper 53 bits, in [0, 1).
double fraction_of(uint64_t word) { return static_cast<double>(word >> 11) * 0x1p-53; }

// Proposes a chunk by the weight of its largest number, and one of its 64 places; accepts the token there as often as
// its weight is to that one. So each token is accepted in proportion to its weight.
int64_t draw_from_all(const ChoiceRow& row) {
  const ChoiceScratch& memory = row.scratch;
  const int64_t num_chunks = row.num_chunks();
  const float scale = row.asked.scale();
  row.kernel.exponentials(memory.maxima, num_chunks, row.peak, scale, memory.bounds);
  double total = 0.0;
  for (int64_t i = 0; i < num_chunks; ++i) memory.reached[i] = total += static_cast<double>(memory.bounds[i]);
  double* last = last_with_weight(memory.reached, num_chunks);
  Words words(static_cast<uint64_t>(row.asked.fraction() * 0x1p53));
  for (int64_t trial = 0; trial < kMostTrials; ++trial) {
    const double target = fraction_of(words.next()) * total;
    const int64_t chunk = std::upper_bound(memory.reached, last, target) - memory.reached;
    const uint64_t word = words.next();
    const int64_t token = chunk * kChunk + static_cast<int64_t>(word >> 58);
    if (token >= row.width) continue;
    const float weight = exp_f32((row.x[token] - row.peak) * scale);
    if (fraction_of(word << 6) * static_cast<double>(memory.bounds[chunk]) < static_cast<double>(weight)) return token;
  }
  return kUnsettled;  // which numbers that are finite do not bring about
}

int64_t choose(const ChoiceCall& call, const VocabularyKernel& kernel, int64_t index, const ChoiceScratch& memory) {
  const float* x = call.logits + index * call.width;
  const int64_t num_chunks = chunks_of(call.width, kChunk);
  if (call.is_raw == 0) {
    kernel.maxima({x, memory.maxima, 1, call.width, kChunk, nullptr, nullptr}, 0, 1);
  } else if (!kernel.finite_maxima(x, call.width, kChunk, memory.maxima)) {
    return kNotFinite;
  }
  const float peak = *std::max_element(memory.maxima, memory.maxima + num_chunks);
  if (!std::isfinite(peak)) return kNotFinite;
  const ChoiceRow row{kernel, call.asked[index], x, call.width, peak, memory};
  if (row.asked.temperature == 0.0) return row.most_likely();
  const int64_t token = row.asked.filters(call.width) ? draw_from_few(row) : draw_from_all(row);
  return token == kUnsettled ? draw_from_whole(row) : token;
}

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_choice_scratch_bytes(int64_t width) {
  return mixtral::ChoiceScratch::bytes(width);
}

// tokens [num_rows]: a token id, or -2 if the row is not finite.
__attribute__((visibility("default"))) void mixtral_choose(const mixtral::ChoiceCall* call, int64_t num_threads) {
  using namespace mixtral;
  const VocabularyKernel& kernel = active_vocabulary_kernel();
  const int64_t threads = std::min(num_threads, 1 + call->num_rows * call->width / kThreadWork);
  parallel(static_cast<int>(threads), [&](Team& team) {
    const ChoiceScratch memory(static_cast<char*>(call->scratch) + team.rank() * ChoiceScratch::bytes(call->width),
                               call->width);
    team.for_each(0, call->num_rows, 1, [&](int64_t row, int64_t) {
      call->tokens[row] = choose(*call, kernel, row, memory);
    });
  });
}
}
