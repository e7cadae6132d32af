#include "token_ops.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "token_ops_kernels.h"

namespace vitrail {
namespace {

// What is worth another thread, some 50 microseconds: one that waits for more work takes a core from
// torch's threads, whose matrix products come between these.
constexpr int64_t kThreadElements = 256 << 10;

const TokenKernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return kTokenAvx512;
    case Isa::kAvx2:
      return kTokenAvx2;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kTokenNeon;
#endif
    default:
      return kTokenPortable;
  }
}

int worth(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kThreadElements, 1, threads));
}

// Calls function(row) for every row, neighbours by the same thread.
template <typename Function>
void for_rows(int64_t rows, int threads, const Function& function) {
  const int64_t parts = threads == 1 ? 1 : std::min<int64_t>(rows, 4 * threads);
  parallel_for(static_cast<int>(parts), threads, [&](int part) {
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) function(row);
  });
}

}  // namespace

void rms_norm(const Norm& work, int threads, Isa isa) {
  const auto kernel = kernels_of(isa).norm[work.bfloat16];
  for_rows(work.rows, worth(work.rows * work.hidden, threads),
           [&](int64_t row) { kernel(work, row); });
}

void rope_and_cache(const Rope& work, int threads, Isa isa) {
  const auto kernel = kernels_of(isa).rope[work.bfloat16];
  const int64_t channels = (work.heads + 2 * work.kv_heads) * work.head_dim;
  for_rows(work.tokens, worth(work.tokens * channels, threads),
           [&](int64_t token) { kernel(work, token); });
}

void paged_decode(const Attention& work, int threads, Isa isa) {
  const auto kernel = kernels_of(isa).attend[work.bfloat16];
  int64_t tokens = 0;
  for (int64_t i = 0; i < work.sequences; ++i) tokens += work.contexts[i];
  const int64_t elements = 2 * tokens * work.heads * work.head_dim;
  parallel_for(static_cast<int>(work.sequences * work.kv_heads), worth(elements, threads),
               [&](int index) {
                 static thread_local std::vector<float> scratch;
                 const int64_t sequence = index / work.kv_heads;
                 const auto needed = static_cast<size_t>(
                     attention_scratch(work, work.contexts[sequence]));
                 if (scratch.size() < needed) scratch.resize(needed);
                 kernel(work, sequence, index % work.kv_heads, scratch.data());
               });
}

}  // namespace vitrail
