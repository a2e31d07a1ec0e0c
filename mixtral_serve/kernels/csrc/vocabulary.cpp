// The entry points of what sampling asks of wide rows.
#include "vocabulary.h"

#include "cpu.h"
#include "parallel.h"

namespace mixtral {
namespace {

constexpr int64_t kThreadWork = 64 << 10;  // numbers that are worth waking a thread

template <typename Body>
void for_each_row(int64_t num_rows, int64_t width, int64_t num_threads, const Body& body) {
  const int64_t threads = 1 + num_rows * width / kThreadWork;
  parallel(static_cast<int>(threads < num_threads ? threads : num_threads),
           [&](Team& team) { team.for_each(0, num_rows, 1, body); });
}

}  // namespace

const VocabularyKernel& active_vocabulary_kernel() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx2) return kVocabularyAvx2;
#endif
  return kVocabularyPortable;
}

}  // namespace mixtral

extern "C" {

__attribute__((visibility("default"))) void mixtral_chunk_maxima(const mixtral::ChunkCall* call, int64_t num_threads) {
  const mixtral::VocabularyKernel& chosen = mixtral::active_vocabulary_kernel();
  mixtral::for_each_row(call->num_rows, call->width, num_threads,
                        [&](int64_t first, int64_t end) { chosen.maxima(*call, first, end); });
}

// out [num_rows]: 1 where all numbers of the row are finite.
__attribute__((visibility("default"))) void mixtral_finite_rows(const float* rows, uint8_t* out, int64_t num_rows,
                                                                int64_t width, int64_t num_threads) {
  const mixtral::VocabularyKernel& chosen = mixtral::active_vocabulary_kernel();
  mixtral::for_each_row(num_rows, width, num_threads,
                        [&](int64_t first, int64_t end) { chosen.finite(rows, width, out, first, end); });
}
}
