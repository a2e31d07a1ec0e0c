// int8 products of many rows for AVX2: seven multiplications for eight products, by Strassen's algorithm in Winograd's
// form (seven products of blocks, fifteen additions).
//
// Rows of a wide block go in pairs, columns in steps of eight, the outputs of a tile in halves. So a pair of rows has
// 2 x 2 blocks A of four columns in every step, and a tile 2 x 2 blocks B of four columns and eight outputs:
//
//   P1 = A11 B11             P2 = A12 B21
//   P3 = (A12 - S2) B22      P4 = A22 (T2 - B21)         S1 = A21 + A22, S2 = S1 - A11
//   P5 = S1 T1               P6 = S2 T2                  T1 = B12 - B11, T2 = B22 - T1
//   P7 = (A11 - A21) (B22 - B12)
//
//   C11 = P1 + P2            C12 = P1 + P6 + P5 + P3
//   C21 = P1 + P6 + P7 - P4  C22 = P1 + P6 + P7 + P5
//
// Left factors are made when a pair is quantised; right ones when a stretch of a tile is unpacked, once for all rows;
// the C once per tile, since every P is summed over all columns on its own. Factors are words of at most 510, products
// are exact in 32 bits, and sums exact modulo 2^32, which holds the result: it has the bits of any other order.
//
// Why: AVX2 cannot multiply bytes of full size and add in 32 bits. A product of words costs a multiplication and an
// addition, and half of the units that add are the ones that multiply; from the first-level cache Zen 3 reaches 80 % of
// the peak by words alone. Two of four vectors of weights are multiplied from memory, which saves instructions: they
// are what counts when somebody else uses the core's other thread.
//
// Rejected: pairs of columns by Winograd's inner product, half as many multiplications for twice as many additions
// (nearly as fast on a core of its own, slower than words alone beside another thread); Strassen's algorithm twice, on
// quads of rows and tiles (an eighth fewer products, but right factors of four tiles cost a tenth of the time: as fast
// on a core of its own, up to 8 % slower beside another thread); six pairs of rows with one tile (more loads);
// stretches of 32 steps (5 % slower); loops unrolled twice (slower beside another thread).
#include <algorithm>
#include <cstdint>

#include "products.h"

#if defined(__x86_64__)
#include "avx2_target.h"

#include "products_avx2.h"
#include "rows_avx2.h"

namespace mixtral {
namespace {

constexpr int kProducts = 7;
constexpr int kStepCols = 8;
constexpr int64_t kGroupSteps = kGroupCols / kStepCols;
constexpr int64_t kStepBytes = kStepCols * kTileRows;  // of a tile
// A factor of two tiles, 8 kB, stays in the first-level cache for all rows.
constexpr int64_t kStretchSteps = 64;
constexpr int kMaxTiles = 2;
// Twelve registers hold the sums of so many pairs with two tiles.
constexpr int kPassPairs = 3;
constexpr int kMaxPairs = kAvx2WideRows / 2;

// Neighbouring steps.
struct Stretch {
  int64_t first, count;

  static Stretch at(int64_t step, int64_t num_steps) {
    const int64_t first = step / kStretchSteps * kStretchSteps;
    return {first, std::min(kStretchSteps, num_steps - first)};
  }
};

// Where the left factors of a wide block lie: [stretch][product][pass][step][pair of the pass][four words]. A row that
// is missing from the last pair is like the other.
struct PairLayout {
  int64_t num_pairs;

  explicit PairLayout(int64_t num_rows) : num_pairs((num_rows + 1) / 2) {}

  int64_t num_passes() const { return (num_pairs + kPassPairs - 1) / kPassPairs; }

  // Pairs of the pass that begins with `first`: kPassPairs, or what is left.
  int64_t pass_pairs(int64_t first) const { return std::min<int64_t>(kPassPairs, num_pairs - first); }

  // Words before the first step of a stretch.
  int64_t offset(const Stretch& stretch, int64_t product, int64_t first_pair) const {
    return 4 * (stretch.first * kProducts * num_pairs + stretch.count * (product * num_pairs + first_pair));
  }
};

// The left factors of a step, each in the low four words.
struct LeftFactors {
  __m128i of[kProducts];

  // Of eight integers of the upper row and of the lower one.
  LeftFactors(__m256i upper, __m256i lower) {
    const __m256i upper_words = _mm256_packs_epi32(upper, upper), lower_words = _mm256_packs_epi32(lower, lower);
    const __m128i a11 = _mm256_castsi256_si128(upper_words), a12 = _mm256_extracti128_si256(upper_words, 1);
    const __m128i a21 = _mm256_castsi256_si128(lower_words), a22 = _mm256_extracti128_si256(lower_words, 1);
    const __m128i s1 = _mm_add_epi16(a21, a22), s2 = _mm_sub_epi16(s1, a11);
    const __m128i all[kProducts] = {a11, a12, _mm_sub_epi16(a12, s2), a22, s1, s2, _mm_sub_epi16(a11, a21)};
    std::copy(all, all + kProducts, of);
  }
};

// The right factors of some steps of one tile or two: [product][step][tile][two vectors of four outputs].
struct RightFactors {
  static constexpr int64_t kTileBytes = 64, kFactorBytes = kMaxTiles * kTileBytes;
  uint8_t of[kProducts][kStretchSteps * kFactorBytes];

  void take(const Tile& tile, int index, const Stretch& stretch) {
    const uint8_t* step = tile.quants + stretch.first * kStepBytes;
    const int64_t first = index * kTileBytes, end = first + stretch.count * kFactorBytes;
    for (int64_t at = first; at < end; at += kFactorBytes, step += kStepBytes) {
      MIXTRAL_UNROLL
      for (int v = 0; v < 2; ++v) {
        const uint8_t* quarter = step + 16 * v;
        const __m256i b11 = load_words(quarter), b12 = load_words(quarter + kStepBytes / 4);
        const __m256i b21 = load_words(quarter + kStepBytes / 2), b22 = load_words(quarter + kStepBytes * 3 / 4);
        const __m256i t1 = _mm256_sub_epi16(b12, b11), t2 = _mm256_sub_epi16(b22, t1);
        const __m256i all[kProducts] = {b11, b21, b22, _mm256_sub_epi16(t2, b21), t1, t2, _mm256_sub_epi16(b22, b12)};
        MIXTRAL_UNROLL
        for (int p = 0; p < kProducts; ++p) store(of[p] + at + 32 * v, all[p]);
      }
    }
  }
};

// Without a register of its own for what lies in memory.
inline __m256i multiply_memory(__m256i left, const uint8_t* right) {
  __m256i result;
  asm("vpmaddwd %2, %1, %0" : "=x"(result) : "x"(left), "m"(*reinterpret_cast<const __m256i*>(right)));
  return result;
}

// Of one product, a pair of rows and eight outputs: in each vector four outputs with two sums each.
using PairSums = int32_t[2][kLanes];

// Adds a stretch to the sums of neighbouring pairs with `factors` of one tile or two, and asks for the pairs `ahead`.
template <int kPairs, int kTiles>
void multiply_pass(const int16_t* rows, int64_t ahead, const uint8_t* factors, int64_t num_steps,
                   PairSums* const* all_sums) {
  __m256i sums[kPairs][2 * kTiles];
  MIXTRAL_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    MIXTRAL_UNROLL
    for (int v = 0; v < 2 * kTiles; ++v) sums[p][v] = load(all_sums[v / 2][p][v % 2]);
  }
  const uint8_t* const end = factors + num_steps * RightFactors::kFactorBytes;
  for (; factors != end; factors += RightFactors::kFactorBytes, rows += 4 * kPairs) {
    prefetch(rows + ahead);
    __m256i first_tile[2] = {load(factors), load(factors + 32)};
    asm volatile("" : "+x"(first_tile[0]), "+x"(first_tile[1]));  // once
    const uint8_t* second_tile = factors + RightFactors::kTileBytes;
    MIXTRAL_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      const __m256i left = broadcast_words(rows + 4 * p);
      MIXTRAL_UNROLL
      for (int v = 0; v < 2; ++v) add_int32(sums[p][v], _mm256_madd_epi16(first_tile[v], left));
      MIXTRAL_UNROLL
      for (int v = 2; v < 2 * kTiles; ++v) add_int32(sums[p][v], multiply_memory(left, second_tile + 32 * (v - 2)));
    }
  }
  MIXTRAL_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    MIXTRAL_UNROLL
    for (int v = 0; v < 2 * kTiles; ++v) store(all_sums[v / 2][p][v % 2], sums[p][v]);
  }
}

using Pass = void (*)(const int16_t*, int64_t, const uint8_t*, int64_t, PairSums* const*);

template <int kTiles>
constexpr Pass kPassOf[kPassPairs] = {multiply_pass<1, kTiles>, multiply_pass<2, kTiles>, multiply_pass<3, kTiles>};

// Asks for lines of memory, a share at a time.
class Lines {
 public:
  Lines(const uint8_t* first, int64_t num_bytes, int64_t num_shares)
      : next_(first), end_(first + num_bytes), share_((num_bytes / 64 + num_shares - 1) / num_shares * 64) {}

  void ask() {
    for (const uint8_t* end = std::min(next_ + share_, end_); next_ < end; next_ += 64) prefetch(next_);
  }

 private:
  const uint8_t *next_, *end_;
  int64_t share_;
};

// The rows of a block times one or two tiles.
class Product {
 public:
  Product(const Block& block, const Tile* tiles, int num_tiles)
      : block_(block), layout_(block.num_rows), tiles_(tiles), num_tiles_(num_tiles),
        num_steps_(block.num_groups * kGroupSteps) {}

  void run(float* out, int64_t stride) {
    for (auto& of_tile : sums_) {
      for (PairSums* sums : of_tile) std::fill_n(&sums[0][0][0], layout_.num_pairs * 2 * kLanes, 0);
    }
    for (int64_t step = 0; step < num_steps_; step += kStretchSteps) add_stretch(Stretch::at(step, num_steps_));
    for (int64_t pair = 0; pair < layout_.num_pairs; ++pair, out += 2 * stride) {
      for (int t = 0; t < num_tiles_; ++t) finish(pair, t, out + t * kTileRows, stride);
    }
  }

 private:
  void add_stretch(const Stretch& stretch) {
    for (int t = 0; t < num_tiles_; ++t) factors_.take(tiles_[t], t, stretch);
    Lines lines[kMaxTiles] = {lines_after(tiles_[0], stretch), lines_after(tiles_[num_tiles_ - 1], stretch)};
    for (int product = 0; product < kProducts; ++product) {
      for (int64_t pair = 0; pair < layout_.num_pairs; pair += kPassPairs) {
        for (Lines& of : lines) of.ask();
        add_product(pair, product, stretch);
      }
    }
  }

  // What is read of a tile after a stretch, to be asked for in shares: one with each pass.
  Lines lines_after(const Tile& tile, const Stretch& stretch) const {
    const int64_t step = stretch.first + stretch.count;
    const bool is_end = step == num_steps_;
    const uint8_t* first = is_end ? tile.next_quants : tile.quants + step * kStepBytes;
    const int64_t num_bytes = Stretch::at(is_end ? 0 : step, num_steps_).count * kStepBytes;
    return Lines(first, num_bytes, kProducts * layout_.num_passes());
  }

  void add_product(int64_t first_pair, int product, const Stretch& stretch) {
    const int64_t pairs = layout_.pass_pairs(first_pair);
    const auto* left = reinterpret_cast<const int16_t*>(block_.quants);
    const int16_t* rows = left + layout_.offset(stretch, product, first_pair);
    PairSums* const sums[kMaxTiles] = {sums_[0][product] + first_pair, sums_[1][product] + first_pair};
    const Pass pass = (num_tiles_ == 1 ? kPassOf<1> : kPassOf<2>)[pairs - 1];
    pass(rows, 4 * stretch.count * pairs, factors_.of[product], stretch.count, sums);
  }

  void finish(int64_t pair, int t, float* out, int64_t stride) const {
    const float* scales = static_cast<const float*>(tiles_[t].scales);
    __m256i results[2][2][2];  // [row][half][vector]
    for (int v = 0; v < 2; ++v) {
      __m256i p[kProducts];
      for (int i = 0; i < kProducts; ++i) p[i] = load(sums_[t][i][pair][v]);
      const __m256i p16 = _mm256_add_epi32(p[0], p[5]), p167 = _mm256_add_epi32(p16, p[6]);
      results[0][0][v] = _mm256_add_epi32(p[0], p[1]);
      results[0][1][v] = _mm256_add_epi32(_mm256_add_epi32(p16, p[4]), p[2]);
      results[1][0][v] = _mm256_sub_epi32(p167, p[3]);
      results[1][1][v] = _mm256_add_epi32(p167, p[4]);
    }
    const int64_t first = 2 * pair, rows = std::min<int64_t>(2, block_.num_rows - first);
    for (int64_t r = 0; r < rows; ++r) {
      for (int h = 0; h < 2; ++h) {
        const __m256 half_scales = _mm256_loadu_ps(scales + kLanes * h);
        int8_results(results[r][h][0], results[r][h][1], block_.offsets[first + r], half_scales,
                     block_.scales[first + r], out + r * stride + kLanes * h);
      }
    }
  }

  const Block& block_;
  const PairLayout layout_;
  const Tile* const tiles_;
  const int num_tiles_;
  const int64_t num_steps_;
  alignas(64) RightFactors factors_;
  alignas(64) PairSums sums_[kMaxTiles][kProducts][kMaxPairs];
};

}  // namespace

void quantize_int8_pair_avx2(const float* upper, const float* lower, int64_t num_cols, int64_t num_groups,
                             const RowPlace& place) {
  const PairLayout layout(place.num_block_rows);
  const int64_t pair = place.row / 2, first_pair = pair / kPassPairs * kPassPairs;
  const int64_t pass_pairs = layout.pass_pairs(first_pair), num_steps = num_groups * kGroupSteps;
  const RowScale upper_scale = RowScale::of(upper, num_cols);
  const float* lower_x = lower != nullptr ? lower : upper;  // results of a row that is missing are not written
  const RowScale lower_scale = RowScale::of(lower_x, num_cols);
  auto* to = reinterpret_cast<int16_t*>(place.quants);
  __m256i upper_sum = _mm256_setzero_si256(), lower_sum = _mm256_setzero_si256();
  for (int64_t step = 0; step < num_steps; ++step) {
    const Stretch stretch = Stretch::at(step, num_steps);
    const int64_t first = step * kStepCols;
    const __m256i upper_columns = upper_scale.quantized(upper + first, num_cols - first);
    const __m256i lower_columns = lower_scale.quantized(lower_x + first, num_cols - first);
    upper_sum = _mm256_add_epi32(upper_sum, upper_columns);
    lower_sum = _mm256_add_epi32(lower_sum, lower_columns);
    const LeftFactors factors(upper_columns, lower_columns);
    const int64_t word = 4 * ((step - stretch.first) * pass_pairs + pair - first_pair);
    MIXTRAL_UNROLL
    for (int p = 0; p < kProducts; ++p) {
      _mm_storeu_si64(to + layout.offset(stretch, p, first_pair) + word, factors.of[p]);
    }
  }
  place.scale[0] = upper_scale.scale;
  place.offsets[place.row] = -128 * sum_of(upper_sum);
  if (lower == nullptr) return;
  place.scale[1] = lower_scale.scale;
  place.offsets[place.row + 1] = -128 * sum_of(lower_sum);
}

void multiply_int8_wide_avx2(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out,
                             int64_t stride) {
  for (int b = 0; b < num_blocks; out += blocks[b].num_rows * stride, ++b) {
    Product(blocks[b], tiles, num_tiles).run(out, stride);
  }
}

}  // namespace mixtral
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
