// The entry point of attention: checks what comes from outside, hands out the work, and combines what was split.
//
// A call is one parallel region: keys and values are stored; then pieces are taken in the order given (longest first
// balances best), one key head at a time; then splits that were computed apart are combined.
#include "attention.h"

#include "cpu.h"
#include "parallel.h"

namespace mixtral {
namespace {

constexpr int64_t kStoreRun = 8;            // rows; two threads rarely meet in one block
constexpr int64_t kThreadWork = 256 << 10;  // multiply-adds that are worth waking a thread

const AttentionKernel& kernel() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx2) return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

// Names in the order of AttentionError in native_attention.py.
enum Error : int { kOk = 0, kBadSlot, kBadBlock, kBadPiece, kBadMerge };

bool between(int64_t value, int64_t low, int64_t end) { return low <= value && value < end; }

struct Span {
  int64_t first, end;  // positions that the rows of a piece see
};

Span visible(const AttentionCall& call, const Piece& piece) {
  const int64_t per_kv_head = call.num_query_heads / call.num_kv_heads;
  const int64_t first = piece.start + piece.first_row / per_kv_head;
  const int64_t last = piece.start + (piece.first_row + piece.num_rows - 1) / per_kv_head;
  return {call.window && first >= call.window ? first - call.window + 1 : 0, last + 1};
}

Error check_piece(const AttentionCall& call, const Piece& piece) {
  const int64_t per_kv_head = call.num_query_heads / call.num_kv_heads;
  if (!between(piece.num_rows, 1, kMaxPieceRows + 1) || piece.start < 0 || piece.start > INT64_C(1) << 40) {
    return kBadPiece;
  }
  if (!between(piece.first_slice_row, 0, call.num_rows)) return kBadPiece;
  const int64_t num_slice_rows = (call.num_rows - piece.first_slice_row) * per_kv_head;
  if (!between(piece.first_row, 0, num_slice_rows - piece.num_rows + 1)) return kBadPiece;
  const Span span = visible(call, piece);
  if (piece.split >= 0) {
    if (!between(piece.partial, 0, call.num_partials)) return kBadPiece;
    if (piece.first_row + piece.num_rows > per_kv_head) return kBadPiece;
    if (!between(piece.split, span.first / kSplitKeys, (span.end - 1) / kSplitKeys + 1)) return kBadPiece;
  }
  const int64_t first = piece.table + span.first / call.block_size;
  const int64_t last = piece.table + (span.end - 1) / call.block_size;
  return first >= 0 && last < call.num_table_entries ? kOk : kBadPiece;
}

Error check(const AttentionCall& call, const Piece* pieces, const Merge* merges) {
  for (int64_t i = 0; i < call.num_rows; ++i) {
    if (!between(call.slots[i], 0, call.num_blocks * call.block_size)) return kBadSlot;
  }
  for (int64_t i = 0; i < call.num_table_entries; ++i) {
    if (!between(call.tables[i], 0, call.num_blocks)) return kBadBlock;
  }
  for (int64_t i = 0; i < call.num_pieces; ++i) {
    if (check_piece(call, pieces[i]) != kOk) return kBadPiece;
  }
  for (int64_t i = 0; i < call.num_merges; ++i) {
    const Merge& merge = merges[i];
    const bool fits = between(merge.row, 0, call.num_rows) && merge.num_partials > 0 && merge.first_partial >= 0 &&
                      merge.first_partial <= call.num_partials - merge.num_partials;
    if (!fits) return kBadMerge;
  }
  return kOk;
}

int useful_threads(const AttentionCall& call, const Piece* pieces) {
  int64_t work = 0;
  for (int64_t i = 0; i < call.num_pieces; ++i) {
    const Span span = visible(call, pieces[i]);
    const int64_t keys = pieces[i].split < 0 || span.end - span.first < kSplitKeys ? span.end - span.first : kSplitKeys;
    work += keys * pieces[i].num_rows;
  }
  const int64_t threads = 1 + 2 * work * call.num_kv_heads * call.head_dim / kThreadWork;
  return static_cast<int>(threads < call.num_threads ? threads : call.num_threads);
}

}  // namespace
}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) int64_t mixtral_attention_workspace_floats(int64_t head_dim) {
  return mixtral::workspace_floats(head_dim);
}

__attribute__((visibility("default"))) int64_t mixtral_attention_partial_floats(int64_t head_dim) {
  return mixtral::partial_floats(head_dim);
}

__attribute__((visibility("default"))) int mixtral_paged_attention(const mixtral::AttentionCall* call) {
  using namespace mixtral;
  const auto* pieces = reinterpret_cast<const Piece*>(call->pieces);
  const auto* merges = reinterpret_cast<const Merge*>(call->merges);
  const Error error = check(*call, pieces, merges);
  if (error != kOk) return error;
  const AttentionKernel& chosen = kernel();
  parallel(useful_threads(*call, pieces), [&](Team& team) {
    float* workspace = call->workspace + team.rank() * workspace_floats(call->head_dim);
    team.for_all(0, call->num_rows, kStoreRun, [&](int64_t first, int64_t end) { store_rows(*call, first, end); });
    const int64_t num_tasks = call->num_pieces * call->num_kv_heads;
    const auto attend = [&](int64_t task, int64_t) {
      chosen.attend(*call, pieces[task / call->num_kv_heads], task % call->num_kv_heads, workspace);
    };
    if (call->num_merges == 0) return team.for_each(1, num_tasks, 1, attend);
    team.for_all(1, num_tasks, 1, attend);
    team.for_each(2, call->num_merges * call->num_query_heads, 1, [&](int64_t task, int64_t) {
      chosen.merge(*call, merges[task / call->num_query_heads], task % call->num_query_heads, workspace);
    });
  });
  return kOk;
}
}
