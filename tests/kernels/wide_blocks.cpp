// Wide blocks on any CPU. Of the instruction sets only AMX has blocks of more than twelve rows; here kernels that lay
// rows out and read them as AMX's do, and multiply as portable C++ does, stand in for it, under the sources that cut
// rows into blocks and tasks. Everything must have the bits of narrow blocks, in memory of exactly the size asked for.
//
//     wide_blocks linear|experts int8|int4
//
// A program, since the sanitizers that watch the memory want one. Prints how many cases it compared; exit 1 and a line
// at the first that differs.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "operations.h"
#include "products.h"
#include "row_blocks.h"

extern "C" void mixtral_linear(const mixtral::LinearWeights* matrix, const float* x, float* out, void* scratch,
                               int64_t num_rows, int32_t num_threads);

namespace mixtral {
namespace {

constexpr int kWideRows = 32;  // as products_amx.cpp
constexpr int kPiece = 64;     // columns of a row that lie together

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

int64_t wide_place(int64_t num_rows, int64_t row, int64_t column) {
  return column / kPiece * kPiece * num_rows + row * kPiece + column % kPiece;
}

// A row of a wide block is that of a narrow block of one row, put down elsewhere.
void quantize(Kind kind, const float* x, int64_t num_cols, int64_t num_groups, const RowPlace& place) {
  if (!place.is_wide) return portable_kernels().quantize_row(kind, x, num_cols, num_groups, place);
  std::vector<int8_t> columns(column_bytes(num_groups));
  std::vector<int32_t> offsets(num_groups);
  const RowPlace alone{columns.data(), offsets.data(), place.scale, 0, 1, false};
  portable_kernels().quantize_row(kind, x, num_cols, num_groups, alone);
  for (size_t c = 0; c < columns.size(); ++c) place.quants[wide_place(place.num_block_rows, place.row, c)] = columns[c];
}

// One row of a wide block, as a narrow block.
struct Narrowed {
  std::vector<int8_t> columns;
  std::vector<int32_t> offsets;
  Block block;

  Narrowed(Kind kind, const Block& from, int row)
      : columns(from.num_groups * kGroupCols), offsets(from.num_groups), block(from) {
    for (size_t c = 0; c < columns.size(); ++c) {
      columns[c] = from.quants[wide_place(from.num_rows, row, c)];
      offsets[kind == Kind::int4 ? c / kGroupCols : 0] -= (kind == Kind::int4 ? 8 : 128) * columns[c];
    }
    block.quants = columns.data(), block.offsets = offsets.data(), block.scales += row;
    block.num_rows = 1, block.is_wide = false;
  }
};

// AMX shapes its registers for the run's first block: a smaller one is read as if it had one row more.
void read_as_amx(const Block& block, int shape) {
  for (int64_t piece = 0; piece < column_bytes(block.num_groups) / kPiece; ++piece) {
    for (int64_t i = 0; i < int64_t{shape} * kPiece; ++i) {
      const volatile int8_t read = block.quants[piece * kPiece * block.num_rows + i];
      static_cast<void>(read);
    }
  }
}

template <Kind kind>
void multiply(const Block* blocks, int num_blocks, const Tile* tiles, int num_tiles, float* out, int64_t stride) {
  const Multiply narrow = portable_kernels().multiply(kind);
  if (!blocks[0].is_wide) return narrow(blocks, num_blocks, tiles, num_tiles, out, stride);
  require(num_blocks <= kMaxRunRows / kWideRows, "a run of too many wide blocks");
  const int shape = blocks[0].num_rows;
  for (const Block* block = blocks; block != blocks + num_blocks; ++block) {
    require(block->is_wide && block->num_rows <= kWideRows, "a wide block of too many rows");
    require(block->num_rows == shape || block->num_rows == shape - 1, "a wide block of quite another size");
    read_as_amx(*block, shape);
    for (int row = 0; row < block->num_rows; ++row, out += stride) {
      const Narrowed one(kind, *block, row);
      narrow(&one.block, 1, tiles, num_tiles, out, stride);
    }
  }
}

bool g_is_wide = false;

const Kernels& stand_in() {
  static const Kernels& portable = portable_kernels();
  static const Kernels kernels = {{1, kNarrowBlockRows}, kWideRows,     quantize,        multiply<Kind::int8>,
                                  multiply<Kind::int4>,  portable.gate, portable.combine};
  return kernels;
}

// Of exactly so many elements, aligned as the kernels want it.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : count_(count) {
    void* at = nullptr;
    require(posix_memalign(&at, 64, std::max<int64_t>(count * sizeof(T), 1)) == 0, "no memory");
    first_.reset(static_cast<T*>(at));
    std::memset(at, 0x5a, count * sizeof(T));
  }

  T* get() const { return first_.get(); }
  T* begin() const { return get(); }
  T* end() const { return get() + count_; }
  bool operator==(const Memory& other) const { return std::memcmp(get(), other.get(), count_ * sizeof(T)) == 0; }

 private:
  struct Free {
    void operator()(T* at) const { std::free(at); }
  };
  int64_t count_;
  std::unique_ptr<T, Free> first_;
};

using Random = std::mt19937;

int64_t pick(Random& random, int64_t first, int64_t last) {
  return std::uniform_int_distribution<int64_t>(first, last)(random);
}

Memory<float> random_rows(Random& random, int64_t num_rows, int64_t num_cols) {
  Memory<float> rows(num_rows * num_cols);
  for (float& x : rows) x = static_cast<float>(pick(random, -127, 127)) / 127.0f;
  return rows;
}

// Packed weights of random bytes, scales of 2^-10 and random multipliers.
class Weights {
 public:
  Weights(Random& random, Kind kind, int64_t num_tiles, int64_t num_groups)
      : quants_(num_tiles * num_groups * (kind == Kind::int4 ? 256 : 512)),
        scales_(num_tiles * (kind == Kind::int4 ? int4_scale_bytes(num_groups) : kTileRows * 4)) {
    for (uint8_t& byte : quants_) byte = static_cast<uint8_t>(pick(random, 0, 255));
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      if (kind == Kind::int8) {
        std::fill_n(reinterpret_cast<float*>(scales_.get()) + tile * kTileRows, kTileRows, 0x1p-10f);
        continue;
      }
      for (int64_t s = 0; s < sections_of(num_groups); ++s) {
        char* scales = scales_.get() + tile * int4_scale_bytes(num_groups);
        const SectionScales section = SectionScales::of(scales, s, num_groups);
        std::fill_n(const_cast<float*>(section.scales), kTileRows, 0x1p-10f);
        auto* multipliers = const_cast<int8_t*>(section.multipliers);
        for (int64_t i = 0; i < section.num_groups * kTileRows; ++i) multipliers[i] = pick(random, -127, 127);
      }
    }
  }

  PackedWeights packed() const { return {quants_.get(), scales_.get()}; }

 private:
  Memory<uint8_t> quants_;
  Memory<char> scales_;
};

// What `compute(out, scratch)` gives with narrow and with wide blocks.
template <typename Compute>
bool is_same(int64_t num_results, int64_t scratch_bytes, const Compute& compute) {
  const Memory<float> narrow(num_results), wide(num_results);
  for (const bool is_wide : {false, true}) {
    g_is_wide = is_wide;
    const Memory<char> scratch(scratch_bytes);
    compute((is_wide ? wide : narrow).get(), scratch.get());
  }
  return narrow == wide;
}

// Few rows as often as many.
int64_t some_rows(Random& random) { return pick(random, 1, pick(random, 0, 1) ? 40 : 300); }

std::string compare_linear(Random& random, Kind kind) {
  const bool is_long = pick(random, 0, 9) == 0;  // several sections
  const int64_t num_rows = is_long ? pick(random, 1, 40) : some_rows(random);
  const int64_t num_cols = is_long ? pick(random, 4000, 4200) : pick(random, 1, 200), num_outputs = pick(random, 1, 70);
  const Weights weights(random, kind, (num_outputs + kTileRows - 1) / kTileRows, groups_of(num_cols));
  const LinearWeights matrix{weights.packed(), num_cols, num_outputs, static_cast<int32_t>(kind)};
  const Memory<float> x = random_rows(random, num_rows, num_cols);
  const int64_t scratch_bytes = mixtral_linear_scratch_bytes(num_rows, num_cols, static_cast<int32_t>(kind));
  const bool same = is_same(num_rows * num_outputs, scratch_bytes, [&](float* out, void* scratch) {
    mixtral_linear(&matrix, x.get(), out, scratch, num_rows, 1);
  });
  if (same) return "";
  return std::to_string(num_rows) + " rows, " + std::to_string(num_cols) + " columns, " + std::to_string(num_outputs) +
         " outputs differ";
}

std::string compare_experts(Random& random, Kind kind) {
  constexpr int64_t kNumExperts = 4, k = 2;
  const int64_t num_rows = some_rows(random), width = pick(random, 1, 100), inner_tiles = pick(random, 1, 5);
  const int64_t up_groups = groups_of(width), down_groups = groups_of(inner_tiles * kTileRows);
  const Weights w1(random, kind, kNumExperts * inner_tiles, up_groups);
  const Weights w2(random, kind, kNumExperts * ((width + kTileRows - 1) / kTileRows), down_groups);
  const Weights w3(random, kind, kNumExperts * inner_tiles, up_groups);
  const Memory<float> hidden = random_rows(random, num_rows, width), weights = random_rows(random, num_rows, k);
  const Memory<int64_t> ids(num_rows * k);
  const bool is_first_popular = pick(random, 0, 1) == 1;
  for (int64_t row = 0; row < num_rows; ++row) {
    ids.get()[row * k] = is_first_popular ? 0 : pick(random, 0, kNumExperts - 1);
    ids.get()[row * k + 1] = (ids.get()[row * k] + pick(random, 1, kNumExperts - 1)) % kNumExperts;
  }
  const int32_t kind_number = static_cast<int32_t>(kind);
  const int64_t scratch_bytes =
      mixtral_experts_scratch_bytes(num_rows, width, k, kNumExperts, inner_tiles, kind_number);
  const bool same = is_same(num_rows * width, scratch_bytes, [&](float* out, void* scratch) {
    const ExpertsCall call{hidden.get(), ids.get(), weights.get(), w1.packed(), w2.packed(),  w3.packed(),
                           out,          scratch,   num_rows,      width,       k,            kNumExperts,
                           inner_tiles,  kind_number, 1};
    require(mixtral_experts(&call) == 0, "experts were refused");
  });
  if (same) return "";
  return std::to_string(num_rows) + " rows, width " + std::to_string(width) + ", " + std::to_string(inner_tiles) +
         " inner tiles differ";
}

}  // namespace

const Kernels& active_kernels() { return g_is_wide ? stand_in() : portable_kernels(); }

}  // namespace mixtral

int main(int argc, char** argv) {
  using namespace mixtral;
  constexpr int kNumCases = 150;
  require(argc == 3, "usage: wide_blocks linear|experts int8|int4");
  const auto compare = std::strcmp(argv[1], "experts") == 0 ? compare_experts : compare_linear;
  const Kind kind = std::strcmp(argv[2], "int4") == 0 ? Kind::int4 : Kind::int8;
  Random random(1);
  for (int i = 0; i < kNumCases; ++i) {
    const std::string fault = compare(random, kind);
    require(fault.empty(), fault);
  }
  std::printf("%d cases\n", kNumCases);
}
