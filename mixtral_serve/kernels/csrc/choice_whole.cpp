// A token drawn from what filters leave of any row, by weighing all of it, in time that is proportional to its width.
//
// Top-k and top-p keep the first so many in the order of likelihood. Where it is cut is found without making it: tokens
// are counted, and their weights added up, in buckets of likelihood, and only the bucket of the cut is sorted.
//
// Weights are std::exp's in fp64, as those of the likely few are.
//
// Rejected: sorting the row (twenty times as long).
#include <cmath>
#include <limits>

#include "choice.h"
#include "math.h"

namespace mixtral {
namespace {

// Exponents from 0 down to where the exponential is 0, a twenty-third of one each. Behind them are tokens without weight.
constexpr float kBucketsPerUnit = 23.0f;
constexpr int64_t kWeightless = kNumBuckets - 1;
static_assert(-kExpLow * kBucketsPerUnit < float(kWeightless), "weights come before");

// The last token that stays, in the order of likelihood: among equals the lower id comes first.
struct Cut {
  float value;
  int64_t id;

  static Cut none() { return {-std::numeric_limits<float>::infinity(), std::numeric_limits<int64_t>::max()}; }
};

Cut earlier_of(const Cut& a, const Cut& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b;
}

class Whole {
 public:
  explicit Whole(const ChoiceRow& row) : row_(row), memory_(row.scratch), scale_(row.asked.scale()) {}

  int64_t draw() {
    weigh();
    keep_up_to(find_cut());
    const double total = sum_chunks();
    return total > 0.0 ? drawn_of(total) : row_.most_likely();
  }

 private:
  void weigh() {
    for (int64_t i = 0; i < row_.width; ++i) {
      memory_.weights[i] = std::exp((static_cast<double>(row_.x[i]) - row_.peak) / row_.asked.temperature);
    }
  }

  Cut find_cut() {
    const int64_t most_kept = row_.asked.most_kept(row_.width);
    const double top_p = row_.asked.top_p;
    Cut cut = Cut::none();
    if (most_kept == 0 && !row_.asked.has_nucleus()) return cut;
    fill_buckets();
    double left = 0.0;  // what top-k leaves weighs
    if (most_kept > 0) {
      cut = cut_where([&](int64_t num, double) { return num >= most_kept; }, &left);
    } else {
      for (int64_t b = 0; b < kWeightless; ++b) left += memory_.bucket_sums[b];
    }
    if (!row_.asked.has_nucleus()) return cut;
    double reached = 0.0;
    return earlier_of(cut, cut_where([&](int64_t, double weight) { return weight >= top_p * left; }, &reached));
  }

  void fill_buckets() {
    std::fill(memory_.bucket_sums, memory_.bucket_sums + kNumBuckets, 0.0);
    std::fill(memory_.bucket_counts, memory_.bucket_counts + kNumBuckets, 0);
    for (int64_t i = 0; i < row_.width; ++i) {
      // Clamped, since a row with a NaN may have numbers beyond its peak.
      const float exponent = std::min(std::max((row_.peak - row_.x[i]) * scale_, 0.0f), -kExpLow) * kBucketsPerUnit;
      memory_.buckets[i] = static_cast<int32_t>(memory_.weights[i] > 0.0 ? exponent : static_cast<float>(kWeightless));
    }
    for (int64_t i = 0; i < row_.width; ++i) {
      memory_.bucket_sums[memory_.buckets[i]] += memory_.weights[i];
      ++memory_.bucket_counts[memory_.buckets[i]];
    }
  }

  // The first token in the order of likelihood up to which `is_enough`(how many there are, what they weigh); sets
  // `weight` to what they weigh, or to what all do where there is no such token.
  template <typename IsEnough>
  Cut cut_where(const IsEnough& is_enough, double* weight) {
    int64_t num = 0;
    *weight = 0.0;
    for (int64_t b = 0; b < kWeightless; ++b) {
      const int64_t count = memory_.bucket_counts[b];
      if (count == 0 || !is_enough(num + count, *weight + memory_.bucket_sums[b])) {
        num += count;
        *weight += memory_.bucket_sums[b];
        continue;
      }
      order_bucket(b);
      int64_t i = 0;
      for (; i < count; ++i) {
        *weight += memory_.weights[memory_.ids[i]];
        // By rounding, the last one may miss what the bucket as a whole reaches.
        if (is_enough(num + i + 1, *weight) || i + 1 == count) break;
      }
      return {row_.x[memory_.ids[i]], memory_.ids[i]};
    }
    return Cut::none();
  }

  // The tokens of a bucket in the order of likelihood, to `ids`.
  void order_bucket(int64_t bucket) {
    int64_t num = 0;
    for (int64_t i = 0; i < row_.width; ++i) {
      memory_.ids[num] = static_cast<int32_t>(i);
      num += memory_.buckets[i] == bucket;
    }
    const float* x = row_.x;
    std::sort(memory_.ids, memory_.ids + num, [x](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  }

  // Takes the weights of all others away.
  void keep_up_to(const Cut& cut) {
    const double least = row_.asked.min_p > 0.0 ? row_.asked.min_p : 0.0;
    const int64_t last = std::min(cut.id, row_.width - 1);
    for (int64_t i = 0; i <= last; ++i) {
      const bool stays = row_.x[i] >= cut.value && memory_.weights[i] >= least;
      memory_.weights[i] = stays ? memory_.weights[i] : 0.0;
    }
    for (int64_t i = last + 1; i < row_.width; ++i) {
      const bool stays = row_.x[i] > cut.value && memory_.weights[i] >= least;
      memory_.weights[i] = stays ? memory_.weights[i] : 0.0;
    }
  }

  // Sums of weights up to the end of each chunk, to `reached`; returns the last one.
  double sum_chunks() {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < row_.num_chunks(); ++chunk) {
      double sums[4] = {};  // one alone would wait for itself
      const int64_t first = chunk * kChunk, end = std::min(first + kChunk, row_.width);
      int64_t i = first;
      for (; i + 4 <= end; i += 4) {
        for (int64_t j = 0; j < 4; ++j) sums[j] += memory_.weights[i + j];
      }
      for (; i < end; ++i) sums[0] += memory_.weights[i];
      memory_.reached[chunk] = total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    return total;
  }

  // Where the cumulative sum of weights by id passes the drawn share of the total.
  int64_t drawn_of(double total) const {
    const double target = row_.asked.fraction() * total;
    double* last = last_with_weight(memory_.reached, row_.num_chunks());
    const int64_t chunk = std::upper_bound(memory_.reached, last, target) - memory_.reached;
    double reached = chunk > 0 ? memory_.reached[chunk - 1] : 0.0;
    int64_t token = chunk * kChunk;
    for (int64_t i = token; i < std::min((chunk + 1) * kChunk, row_.width); ++i) {
      if (memory_.weights[i] == 0.0) continue;
      token = i;  // by rounding, the last one may miss what the chunk as a whole reaches
      reached += memory_.weights[i];
      if (reached > target) break;
    }
    return token;
  }

  const ChoiceRow& row_;
  const ChoiceScratch& memory_;
  const float scale_;
};

}  // namespace

int64_t draw_from_whole(const ChoiceRow& row) { return Whole(row).draw(); }

}  // namespace mixtral
