// A parameter group's step and past weights where nothing is new but the gradients, the learning rate and the clock:
// what layerpipe_kernels.optim.routine says, in few instructions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "collect.h"
#include "plan.h"

namespace layerpipe {

class Routine {
   public:
    // `group`, `state`: the optimizer's dicts. `settings`: the group's keys that must not change; those that may are
    // read from it: "lr", "updates", "last_lr". `current()` is the number of threads on the host, the stream and 1 on a
    // GPU. `touched()` tells torch that the arrays have changed. `mixture(t, lr)` is the taps of past weights after
    // update `t`, `(newest, averages)`, the same for all `t > delay`; None where the group makes its past otherwise.
    // `horizon`: of the weights' prediction, before the step and after it.
    Routine(pybind11::dict group, pybind11::tuple settings, pybind11::dict state, pybind11::object collector,
            pybind11::object plan, pybind11::object current, pybind11::object touched, pybind11::object mixture,
            int64_t delay, double horizon, const pybind11::object& exchange);

    // Whether the group's settings are as they were, and its learning rate a number that can be used.
    bool fits() const;

    // Whether `fits()` and the arrays and gradients are what they were; looks up where the gradients lie now.
    bool ready();

    // Makes the step, with the gradients that `ready()` has found.
    void step();

    // Writes the past weights of the group's `i`-th parameter into `out`; false where something is not what it was.
    bool past(size_t i, pybind11::handle out);

   private:
    bool unchanged() const;
    Target target() const;
    std::optional<pybind11::list> params() const;

    pybind11::dict group_, state_;
    pybind11::tuple settings_;
    std::vector<pybind11::object> values_;  // of the settings
    pybind11::object collector_object_, plan_object_, current_, touched_, mixture_;
    const Collector& collector_;
    StepPlan& plan_;
    int64_t delay_;
    double horizon_;
    Exchange exchange_;

    int64_t mixed_t_ = -1;  // when the taps were asked for
    double mixed_lr_ = 0.0, newest_tap_ = 0.0;
    std::vector<double> ema_taps_;
};

}  // namespace layerpipe
