// Spreads spans over threads.
#pragma once

#include <cstdint>
#include <functional>

#include "span.h"

namespace layerpipe {

constexpr int64_t kCpuChunk = 1 << 15;
// Below this many elements neither another thread nor giving up the interpreter lock pays for itself.
constexpr int64_t kSmallWork = 1 << 15;

// Calls `work` once with every number below `chunks`, on up to `threads` threads; `numel` elements in all.
void parallel_chunks(size_t chunks, int64_t numel, int threads, const std::function<void(size_t)>& work);

// Compute in double where `out` or the averages are, else in float.
void cpu_reconstruct(const Reconstruction& work, int threads);
void cpu_average(const Averages& work, int threads);

// Whether there is no NaN and no infinity.
bool all_finite(const void* array, Dtype dtype, int64_t numel);

}  // namespace layerpipe
