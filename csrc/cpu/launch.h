// Spreads spans over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "span.h"

namespace layerpipe {

constexpr int64_t kCpuChunk = 1 << 15;
// Below this many elements neither another thread nor giving up the interpreter lock pays for itself.
constexpr int64_t kSmallWork = 1 << 15;

template <class Rule>
struct CpuStep {
    const std::vector<Record>& records;
    const std::vector<Chunk>& chunks;
    const std::vector<const void*>& grads;
    const std::vector<TensorScalars<Rule>>& scalars;
    Layout layout;
    int64_t numel;
};

template <class Rule>
void cpu_step(const CpuStep<Rule>& step, int threads);

// Computes in double where `out` or the averages are, else in float.
void cpu_reconstruct(const Reconstruction& work, int64_t numel, int threads);
void cpu_ema_update(const Averages& work, int64_t numel, int threads);

// Whether there is no NaN and no infinity.
bool all_finite(const void* array, Dtype dtype, int64_t numel);

}  // namespace layerpipe
