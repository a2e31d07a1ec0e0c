// The next token of each row: the most likely one, or one drawn from the whole vocabulary or from what filters leave.
// model/sampler.py says what the filters mean, and model/draws.py how a token is drawn. A row is worked on while it
// lies in a cache, by one thread.
//
// The whole vocabulary is drawn from without its exponentials: of each chunk only that of the largest number is
// computed, which bounds the others.
//
// Of a filtered row only the most likely few are ranked: all numbers that reach a threshold, which the maxima of short
// chunks give. Where that does not settle it (a nucleus wider than some thousand tokens, a cut that hangs on rounding,
// thousands of equals) the row is handed back, and where no trial of a draw from all is accepted, which numbers that
// are finite do not bring about.
//
// Whatever the numbers are, a token lies within the row.
//
// The law: a token depends on nothing but its row. Weights of ranked tokens are std::exp's in fp64, the one number here
// that the machine's C library has a say in; all else has the same bits on every instruction set.
//
// Rejected: inverting the cumulative distribution of the whole vocabulary (thirty times as many exponentials).
#include <algorithm>
#include <cmath>
#include <limits>

#include "math.h"
#include "parallel.h"
#include "vocabulary.h"

namespace mixtral {
namespace {

// Limits here and in model/draws.py mean the same and need not be equal, but for kChunk, by which tokens are proposed.
constexpr int64_t kUnsettled = -1, kNotFinite = -2;
constexpr int64_t kThreadWork = 64 << 10;  // numbers that are worth waking a thread
constexpr int64_t kChunk = 64;  // numbers of which the largest is known
constexpr int64_t kGlance = 16;  // numbers of a chunk that are looked at together
constexpr int64_t kShareChunk = 256;  // numbers whose shares are added up together
constexpr int64_t kFirstRanked = 64, kMostRanked = 2048, kWider = 16;
constexpr int64_t kCapacity = 2 * kMostRanked;  // room for equals
constexpr int64_t kMostTrials = 8192;  // of which each accepts once in 64 times or more often
// Twice what a total in fp32 may be off.
constexpr double kTotalError = 2e-5;
constexpr double kLeastTemperature = 1e-30;  // a smaller one is not distinguishable from it, and would be 0 in fp32

// What a row asks for: a row of the tensor that native_choice.py fills.
struct Asked {
  double temperature;  // 0: the most likely token
  double top_k;        // 0: all
  double top_p;
  double min_p;
  double draw;  // in [0, 1); its first 53 bits count
};

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

struct Candidate {
  float value;
  int32_t id;
  double weight;
};

int64_t chunks_of(int64_t width, int64_t length) { return (width + length - 1) / length; }

// Where the cumulative sum of weights passes `draw` times their total.
int64_t invert(const Candidate* candidates, int64_t count, double draw) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += candidates[i].weight;
  const double target = draw * total;
  double reached = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    reached += candidates[i].weight;
    // Rounding may lift the target to the total; the last one with a weight is meant then.
    if (reached > target || reached >= total) return i;
  }
  return count - 1;
}

int64_t num_from(const float* x, int64_t count, float least) {
  int32_t num = 0;
  for (int64_t i = 0; i < count; ++i) num += x[i] >= least;
  return num;
}

// Where ranking begins.
struct Threshold {
  float value;
  bool is_lowest;  // all finite numbers reach it
};

// A number that `least` of the finite numbers reach, or all where there are no more, and hardly more than `least` where
// they differ. Halving the range again and again measured faster than std::nth_element, whose branches nobody can
// predict.
Threshold threshold_of(const float* x, int64_t count, int64_t least) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low && x[i] > -std::numeric_limits<float>::infinity() ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  if (num_from(x, count, low) <= least) return {low, true};
  const float lowest = low;
  for (int step = 0; step < 32; ++step) {
    const float middle = low + (high - low) / 2;
    const int64_t num = num_from(x, count, middle);
    (num >= least ? low : high) = middle;
    if (num >= least && num <= least + least / 4) break;
  }
  return {low, low == lowest};
}

class Row {
 public:
  Row(const ChoiceCall& call, const VocabularyKernel& kernel, const float* x, const Asked& asked, char* scratch)
      : kernel_(kernel), asked_(asked), x_(x), width_(call.width), is_raw_(call.is_raw != 0) {
    candidates_ = reinterpret_cast<Candidate*>(scratch);
    reached_ = reinterpret_cast<double*>(candidates_ + kCapacity);
    maxima_ = reinterpret_cast<float*>(reached_ + chunks_of(width_, kChunk));
    bounds_ = maxima_ + chunks_of(width_, kChunk);
    shares_ = bounds_ + chunks_of(width_, kChunk);
  }

  static int64_t scratch_bytes(int64_t width) {
    const int64_t bytes = 16 * chunks_of(width, kChunk) + 4 * chunks_of(width, kShareChunk);
    return kCapacity * static_cast<int64_t>(sizeof(Candidate)) + (bytes + 63) / 64 * 64;
  }

  int64_t choose() {
    const int64_t num_chunks = chunks_of(width_, kChunk);
    if (!is_raw_) {
      kernel_.maxima({x_, maxima_, 1, width_, kChunk, nullptr, nullptr}, 0, 1);
    } else if (!kernel_.finite_maxima(x_, width_, kChunk, maxima_)) {
      return kNotFinite;
    }
    peak_ = *std::max_element(maxima_, maxima_ + num_chunks);
    if (!std::isfinite(peak_)) return kNotFinite;
    if (asked_.temperature == 0.0) return most_likely();
    if (top_k() == 0 && asked_.top_p >= 1.0 && asked_.min_p <= 0.0) return draw_from_all();
    const int64_t first = std::max(kFirstRanked, top_k() + 1);
    for (int64_t least = std::min(first, width_); least <= kMostRanked; least = std::min(least * kWider, width_)) {
      const int64_t token = draw_filtered(rank(least));
      if (token != kUnsettled || least == width_) return token;
    }
    return kUnsettled;
  }

 private:
  // 0 where it is off.
  int64_t top_k() const {
    const bool is_on = asked_.top_k > 0.0 && asked_.top_k < static_cast<double>(width_);
    return is_on ? static_cast<int64_t>(asked_.top_k) : 0;
  }

  // The lowest id among equals.
  int64_t most_likely() const {
    const float* chunk = std::find(maxima_, maxima_ + chunks_of(width_, kChunk), peak_);
    return std::find(x_ + (chunk - maxima_) * kChunk, x_ + width_, peak_) - x_;
  }

  float scale() const { return static_cast<float>(1.0 / std::max(asked_.temperature, kLeastTemperature)); }

  void sum_shares() {
    const float scales = scale();
    kernel_.shares({x_, shares_, 1, width_, kShareChunk, &peak_, &scales}, 0, 1);
  }

  // Proposes a chunk by the weight of its largest number, and one of its 64 places; accepts the token there as often
  // as its weight is to that one. So each token is accepted in proportion to its weight.
  int64_t draw_from_all() {
    const int64_t num_chunks = chunks_of(width_, kChunk);
    kernel_.exponentials(maxima_, num_chunks, peak_, scale(), bounds_);
    double total = 0.0;
    for (int64_t i = 0; i < num_chunks; ++i) reached_[i] = total += static_cast<double>(bounds_[i]);
    // Rounding may lift a target to the total; the last chunk with a weight is meant then.
    const int64_t last = std::lower_bound(reached_, reached_ + num_chunks - 1, total) - reached_;
    const bool is_fraction = asked_.draw >= 0.0 && asked_.draw < 1.0;
    Words words(is_fraction ? static_cast<uint64_t>(asked_.draw * 0x1p53) : 0);
    for (int64_t trial = 0; trial < kMostTrials; ++trial) {
      const double target = fraction_of(words.next()) * total;
      const uint64_t word = words.next();
      const int64_t chunk = std::upper_bound(reached_, reached_ + last, target) - reached_;
      const int64_t token = chunk * kChunk + static_cast<int64_t>(word >> 58);
      if (token >= width_) continue;
      const float weight = exp_f32((x_[token] - peak_) * scale());
      if (fraction_of(word << 6) * static_cast<double>(bounds_[chunk]) < static_cast<double>(weight)) return token;
    }
    return kUnsettled;
  }

  // Collects `least` numbers or more, in order, and never what is forbidden; how many, or 0 if there is no room.
  int64_t rank(int64_t least) {
    const int64_t num_chunks = chunks_of(width_, kChunk);
    // Every chunk whose largest number reaches the threshold has a number that does.
    Threshold threshold = threshold_of(maxima_, num_chunks, least);
    is_all_ = false;
    if (threshold.is_lowest) {  // too few chunks have numbers: a mask left few tokens, or many are to be ranked
      threshold = threshold_of(x_, width_, least);
      is_all_ = threshold.is_lowest;
    }
    int64_t num = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      if (maxima_[chunk] < threshold.value) continue;
      const int64_t end = std::min((chunk + 1) * kChunk, width_);
      for (int64_t first = chunk * kChunk; first < end; first += kGlance) {
        const int64_t count = std::min(kGlance, end - first);
        if (num_from(x_ + first, count, threshold.value) == 0) continue;  // most have none, and it is soon seen
        if (num + kGlance > kCapacity) return 0;
        for (int64_t id = first; id < first + count; ++id) {
          candidates_[num].value = x_[id];
          candidates_[num].id = static_cast<int32_t>(id);
          num += x_[id] >= threshold.value;  // no branch: nobody can predict it. What is not a number has no place.
        }
      }
    }
    std::sort(candidates_, candidates_ + num, [](const Candidate& a, const Candidate& b) {
      return a.value != b.value ? a.value > b.value : a.id < b.id;
    });
    for (int64_t i = 0; i < num; ++i) {
      candidates_[i].weight = std::exp((static_cast<double>(candidates_[i].value) - peak_) / asked_.temperature);
    }
    return num;
  }

  // How many of the `num` ranked tokens stay, if all tokens together weigh `total`; `num` may mean more.
  int64_t num_kept(int64_t num, double total) const {
    const int64_t k = top_k();
    if (k > 0) {
      total = 0.0;
      for (int64_t i = 0; i < std::min(k, num); ++i) total += candidates_[i].weight;
    }
    int64_t kept = k > 0 ? std::min(k, num) : num, nucleus = 1;
    double reached = 0.0;
    for (int64_t i = 0; i < num && asked_.top_p < 1.0; ++i) {
      reached += candidates_[i].weight;
      if (reached < asked_.top_p * total) ++nucleus;
    }
    if (asked_.top_p < 1.0) kept = std::min(kept, nucleus);
    int64_t likely = 1;
    while (likely < num && candidates_[likely].weight >= asked_.min_p) ++likely;
    return std::min(kept, likely);
  }

  int64_t draw_filtered(int64_t num) {
    if (num == 0) return kUnsettled;
    double total = 0.0;
    for (int64_t i = 0; i < num; ++i) total += candidates_[i].weight;
    int64_t kept = num_kept(num, total);
    if (!is_all_ && asked_.top_p < 1.0 && top_k() == 0) {
      sum_shares();
      total = 0.0;
      for (int64_t i = 0; i < chunks_of(width_, kShareChunk); ++i) total += static_cast<double>(shares_[i]);
      kept = num_kept(num, total * (1.0 + kTotalError));
      if (kept != num_kept(num, total * (1.0 - kTotalError))) return kUnsettled;
    }
    if (kept >= num && !is_all_) return kUnsettled;
    std::sort(candidates_, candidates_ + kept, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    return candidates_[invert(candidates_, kept, asked_.draw)].id;
  }

  const VocabularyKernel& kernel_;
  const Asked& asked_;
  const float* x_;
  const int64_t width_;
  const bool is_raw_;
  float peak_ = 0.0f;
  bool is_all_ = false;    // every token with a weight is ranked
  Candidate* candidates_;  // [kCapacity]
  double* reached_;        // [chunks of kChunk]: sums of the bounds up to each
  float* maxima_;          // [chunks of kChunk]
  float* bounds_;          // [chunks of kChunk]: weights of the maxima
  float* shares_;          // [chunks of kShareChunk]
};

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_choice_scratch_bytes(int64_t width) {
  return mixtral::Row::scratch_bytes(width);
}

// tokens [num_rows]: a token id; -1 if the row is handed back; -2 if it is not finite.
__attribute__((visibility("default"))) void mixtral_choose(const mixtral::ChoiceCall* call, int64_t num_threads) {
  using namespace mixtral;
  const VocabularyKernel& chosen = active_vocabulary_kernel();
  const int64_t threads = std::min(num_threads, 1 + call->num_rows * call->width / kThreadWork);
  const int64_t scratch_bytes = Row::scratch_bytes(call->width);
  parallel(static_cast<int>(threads), [&](Team& team) {
    char* scratch = static_cast<char*>(call->scratch) + team.rank() * scratch_bytes;
    team.for_each(0, call->num_rows, 1, [&](int64_t row, int64_t) {
      call->tokens[row] = Row(*call, chosen, call->logits + row * call->width, call->asked[row], scratch).choose();
    });
  });
}
}
