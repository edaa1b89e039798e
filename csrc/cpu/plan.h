// A parameter group's arrays and chunks, and the launchers that spread them over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../chunks.h"
#include "span.h"

namespace layerpipe {

struct SgdOptions {
    double lr, momentum, dampening, weight_decay;
    bool nesterov, maximize, ema_of_gradient;
    std::vector<double> decays, taps;
    double tap_update;
};

// Below this many elements neither another thread nor giving up the interpreter lock pays for itself.
constexpr int64_t kSmallWork = 1 << 15;

// Does not own memory: the caller keeps the tensors alive and rebuilds the plan when a pointer changes.
template <class T>
class StepPlan {
   public:
    StepPlan(std::vector<int64_t> numels, std::vector<uint64_t> weights, std::vector<uint64_t> velocities,
             std::vector<uint64_t> emas, int ema_count, std::vector<uint64_t> pasts);

    void sgd_step(const std::vector<uint64_t>& grads, const std::vector<uint8_t>& first, const SgdOptions& options,
                  int threads);

    int64_t numel() const { return numel_; }
    size_t tensors() const { return numels_.size(); }
    size_t chunks() const { return chunks_.size(); }

   private:
    std::vector<int64_t> numels_;
    std::vector<SgdArrays<T>> arrays_;
    std::vector<Chunk> chunks_;
    int ema_count_;
    int64_t numel_ = 0;
};

template <class T>
void ema_update(const EmaArrays<T>& arrays, int64_t numel, int threads);

template <class T>
void reconstruct(const Reconstruction<T>& arrays, int64_t numel, int threads);

}  // namespace layerpipe
