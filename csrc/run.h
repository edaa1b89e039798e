// What the module's calls do: numbers and addresses in, a kernel's arguments out.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/launch.h"
#include "plan.h"

namespace layerpipe {

// Giving up the interpreter lock for a few microseconds of work costs more than it frees.
template <class Work>
void run_unlocked(bool large, const Work& work) {
    std::optional<pybind11::gil_scoped_release> released;
    if (large) released.emplace();
    work();
}

Dtype dtype_of(int number);

template <class P>
P at(uint64_t address) {
    return reinterpret_cast<P>(address);
}

// `out = weight + sum_k taps[k] terms[k]`; on a GPU the taps may lie at `taps_at` instead.
void run_reconstruct(int device, uint64_t out, int out_dtype, uint64_t weight, int weight_dtype, int64_t numel,
                     const std::vector<uint64_t>& terms, const std::vector<int>& dtypes,
                     const std::vector<double>& taps, uint64_t taps_at, uint64_t stream, int threads);

void run_ema_update(int device, const std::vector<uint64_t>& emas, const std::vector<int>& dtypes, uint64_t update,
                    int update_dtype, int64_t numel, const std::vector<double>& decays, uint32_t seed, double turn,
                    uint64_t stream, int threads);

// The past weights of a plan's `i`-th tensor: by the newest update, where it has a tap, and its first averages. That
// update is kept where weights are predicted; elsewhere the momentum buffer tells it.
void run_past(const StepPlan& plan, size_t i, uint64_t out, double newest_tap, const std::vector<double>& ema_taps,
              uint64_t stream, int threads);

void run_step(StepPlan& plan, const Moment& moment, const std::vector<uint8_t>& first, uint64_t stream, int threads);

}  // namespace layerpipe
