// A token drawn from what filters leave, by looking at the most likely few: the numbers that reach a threshold, which
// the maxima of short chunks give. While they are few, each is ranked by counting those above it, which needs no
// branches: at 70 tokens sorting takes three times as long.
//
// Where that does not settle it (a nucleus of a thousand tokens, a cut that hangs on rounding, a thousand equals) the
// answer is kUnsettled.
//
// Weights of ranked tokens are std::exp's in fp64, the one number here that the machine's C library has a say in.
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "choice.h"

namespace mixtral {
namespace {

constexpr int64_t kTooFew = -3;  // beside kUnsettled
constexpr int64_t kFirstFew = 64, kLastFew = 1024, kWider = 4;
constexpr int64_t kMostFew = 1344;  // that there is room for
constexpr int64_t kMostCounted = 320;
constexpr int64_t kPadding = 16;
// Twice what a total in fp32 may be off.
constexpr double kTotalError = 2e-5;

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

// The smallest and the largest of the finite numbers.
std::pair<float, float> range_of(const float* x, int64_t count) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float low[16], high[16];  // one alone would wait for itself
  std::fill(low, low + 16, kInfinity);
  std::fill(high, high + 16, -kInfinity);
  const auto take = [&](int64_t i, int64_t lane) {
    low[lane] = x[i] < low[lane] && x[i] > -kInfinity ? x[i] : low[lane];
    high[lane] = x[i] > high[lane] ? x[i] : high[lane];
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) take(i + lane, lane);
  }
  for (; i < count; ++i) take(i, 0);
  return {*std::min_element(low, low + 16), *std::max_element(high, high + 16)};
}

// A number that `least` of the finite numbers reach, or all where there are no more, and hardly more than `least` where
// they differ. Halving the range again and again measured faster than std::nth_element, whose branches nobody can
// predict.
Threshold threshold_of(const float* x, int64_t count, int64_t least) {
  auto [low, high] = range_of(x, count);
  const float lowest = low;
  if (num_from(x, count, low) <= least) return {low, true};
  for (int step = 0; step < 32; ++step) {
    const float middle = low + (high - low) / 2;
    const int64_t num = num_from(x, count, middle);
    (num >= least ? low : high) = middle;
    if (num >= least && num <= least + least / 4) break;
  }
  return {low, low == lowest};
}

// Bit i: x[i] reaches `least`; of sixteen numbers.
uint64_t sixteen_from(const float* x, float least) {
#if defined(__SSE2__)
  const __m128 bound = _mm_set1_ps(least);
  const auto four = [&](int first) { return _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(x + first), bound)); };
  const __m128i low = _mm_packs_epi32(four(0), four(4)), high = _mm_packs_epi32(four(8), four(12));
  return static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint64_t>(x[i] >= least) << i;
  return bits;
#endif
}

// The same of a chunk.
uint64_t bits_from(const float* x, int64_t count, float least) {
  uint64_t bits = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) bits |= sixteen_from(x + i, least) << i;
  for (; i < count; ++i) bits |= static_cast<uint64_t>(x[i] >= least) << i;
  return bits;
}

class Few {
 public:
  explicit Few(const ChoiceRow& row) : row_(row), most_kept_(row.asked.most_kept(row.width)) {}

  // Takes `least` numbers or more, and never what is forbidden. Whether there was room for them.
  bool take(int64_t least) {
    // Every chunk whose largest number reaches the threshold has a number that does.
    Threshold threshold = threshold_of(row_.scratch.maxima, row_.num_chunks(), least);
    if (threshold.is_lowest) {  // too few chunks have numbers: a mask left few tokens, or many are to be ranked
      threshold = threshold_of(row_.x, row_.width, least);
      is_all_ = threshold.is_lowest;
    }
    if (!collect(threshold.value)) return false;
    num_ <= kMostCounted ? rank_by_counting() : rank_by_sorting();
    const int64_t num = num_eligible();
    for (int64_t i = 0; i < num; ++i) {
      weights_[i] = std::exp((static_cast<double>(values_[order_[i]]) - row_.peak) / row_.asked.temperature);
    }
    return true;
  }

  // A token, kUnsettled, or kTooFew where more of them may settle it.
  int64_t draw() {
    int64_t kept = 0;
    if (is_all_ || most_kept_ > 0 || !row_.asked.has_nucleus()) {
      kept = num_kept(weight_of_eligible());
    } else {
      const double total = total_of_row();
      kept = num_kept(total * (1.0 + kTotalError));
      if (kept != num_kept(total * (1.0 - kTotalError))) return kUnsettled;
      // The others weigh no more than the last one each.
      const double most = weight_of_eligible() + static_cast<double>(kMostFew - num_) * weights_[num_ - 1];
      if (most < row_.asked.top_p * total) return kUnsettled;
    }
    return kept < num_ || is_all_ ? ids_[invert(kept)] : kTooFew;
  }

 private:
  bool collect(float least) {
    num_ = 0;
    const int64_t num_chunks = row_.num_chunks();
    for (int64_t first_chunk = 0; first_chunk < num_chunks; first_chunk += 64) {
      const int64_t count = std::min<int64_t>(64, num_chunks - first_chunk);
      uint64_t chunks = bits_from(row_.scratch.maxima + first_chunk, count, least);
      for (; chunks != 0; chunks &= chunks - 1) {
        if (num_ + kChunk > kMostFew) return false;
        collect_from((first_chunk + __builtin_ctzll(chunks)) * kChunk, least);
      }
    }
    return num_ > 0;
  }

  void collect_from(int64_t first, float least) {
    uint64_t bits = bits_from(row_.x + first, std::min(kChunk, row_.width - first), least);
    for (; bits != 0; bits &= bits - 1) {
      ids_[num_] = static_cast<int32_t>(first + __builtin_ctzll(bits));
      values_[num_] = row_.x[ids_[num_]];
      ++num_;
    }
  }

  // Among equals the lower id comes first.
  void rank_by_counting() {
    std::fill(values_ + num_, values_ + num_ + kPadding, -std::numeric_limits<float>::infinity());
    const int64_t padded = (num_ + kPadding - 1) / kPadding * kPadding;
    for (int64_t i = 0; i < padded; i += 4) {
      int32_t above[4][4] = {};  // of four at once, in four sums each
      for (int64_t j = 0; j < padded; j += 4) {
        for (int64_t k = 0; k < 4; ++k) {
          for (int64_t lane = 0; lane < 4; ++lane) above[k][lane] += values_[j + lane] > values_[i + k];
        }
      }
      for (int64_t k = 0; k < 4; ++k) ranks_[i + k] = std::accumulate(above[k], above[k] + 4, 0);
    }
    const int64_t total = std::accumulate(ranks_, ranks_ + num_, int64_t{0});
    const bool has_equals = total != num_ * (num_ - 1) / 2;
    for (int64_t i = 0; i < num_ && has_equals; ++i) {
      for (int64_t j = 0; j < i; ++j) ranks_[i] += values_[j] == values_[i];
    }
    for (int64_t i = 0; i < num_; ++i) order_[ranks_[i]] = static_cast<int32_t>(i);
  }

  void rank_by_sorting() {
    std::iota(order_, order_ + num_, 0);
    std::sort(order_, order_ + num_, [this](int32_t a, int32_t b) {
      return values_[a] != values_[b] ? values_[a] > values_[b] : a < b;
    });
    for (int64_t i = 0; i < num_; ++i) ranks_[order_[i]] = static_cast<int32_t>(i);
  }

  // How many of the ranked ones top-k leaves.
  int64_t num_eligible() const { return most_kept_ > 0 ? std::min(most_kept_, num_) : num_; }

  double weight_of_eligible() const { return std::accumulate(weights_, weights_ + num_eligible(), 0.0); }

  // How many of the ranked ones stay, if all that top-k leaves weigh `total`; all of them may mean more.
  int64_t num_kept(double total) const {
    const int64_t num = num_eligible();
    int64_t kept = num;
    if (row_.asked.has_nucleus()) {
      double reached = 0.0;
      kept = 1;
      for (int64_t i = 0; i < num; ++i) {
        reached += weights_[i];
        if (reached < row_.asked.top_p * total) ++kept;
      }
      kept = std::min(kept, num);
    }
    int64_t likely = 1;
    while (likely < kept && !(weights_[likely] < row_.asked.min_p)) ++likely;
    return likely;
  }

  double total_of_row() {
    if (total_of_row_ == 0.0) {
      const float scale = row_.asked.scale();
      float* shares = row_.scratch.shares;
      row_.kernel.shares({row_.x, shares, 1, row_.width, kShareChunk, &row_.peak, &scale}, 0, 1);
      total_of_row_ = std::accumulate(shares, shares + chunks_of(row_.width, kShareChunk), 0.0);
    }
    return total_of_row_;
  }

  // Where the cumulative sum of the `kept` most likely ones' weights passes the drawn share of their total.
  int64_t invert(int64_t kept) {
    double total = 0.0;
    for (int64_t i = 0; i < num_; ++i) {
      by_id_[i] = ranks_[i] < kept ? weights_[ranks_[i]] : 0.0;
      total += by_id_[i];
    }
    const double target = row_.asked.fraction() * total;
    double reached = 0.0;
    for (int64_t i = 0; i < num_; ++i) {
      reached += by_id_[i];
      // Rounding may lift the target to the total; the last one with a weight is meant then.
      if (reached > target || reached >= total) return i;
    }
    return order_[0];
  }

  const ChoiceRow& row_;
  const int64_t most_kept_;
  bool is_all_ = false;  // every token with a weight is ranked
  double total_of_row_ = 0.0;
  int64_t num_ = 0;
  float values_[kMostFew + kPadding];  // by ascending id, as are
  int32_t ids_[kMostFew], ranks_[kMostFew + kPadding];
  double by_id_[kMostFew];
  int32_t order_[kMostFew];  // by descending value, as are
  double weights_[kMostFew];
};

}  // namespace

int64_t draw_from_few(const ChoiceRow& row) {
  Few few(row);
  const int64_t first = std::max(kFirstFew, row.asked.most_kept(row.width) + 1);
  for (int64_t least = first; least <= kLastFew; least *= kWider) {
    if (!few.take(least)) break;
    const int64_t token = few.draw();
    if (token != kTooFew) return token;
  }
  return kUnsettled;
}

}  // namespace mixtral
