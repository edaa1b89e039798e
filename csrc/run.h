// What the module's calls do, on whichever processor a target names.
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

void run_reconstruct(const Reconstruction& work, const Target& target);
void run_average(const Averages& work, const Target& target);

// The past weights of a plan's `i`-th tensor: by the newest update, where it has a tap, and its first averages. That
// update is kept where weights are predicted; elsewhere the momentum buffer tells it.
void run_past(const StepPlan& plan, size_t i, void* out, double newest_tap, const std::vector<double>& ema_taps,
              const Target& target);

void run_step(StepPlan& plan, const Moment& moment, const std::vector<uint8_t>& first, const Target& target);

}  // namespace layerpipe
