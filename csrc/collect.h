// Gathers a step's gradients from Python without a Python loop.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "plan.h"
#include "tensor.h"

namespace layerpipe {

// Knows the objects that a plan was made from: the parameters of a group, those of them that have gradients, and the
// tensors in their states. Looks at every one of them in every step, because anybody may have exchanged one.
class Collector {
   public:
    // `params`: the group's list. `moving`: per parameter, whether the plan has it. `state`: the optimizer's, parameter
    // to dict. `keys`: of the state's tensors that the plan has. `exchange`: torch's DLPack capsule, or None.
    Collector(const pybind11::list& params, const std::vector<bool>& moving, const pybind11::dict& state,
              pybind11::tuple keys, const pybind11::object& exchange);

    // Takes the gradients into the plan and says true if all is as it was and every gradient is of the plan's dtype
    // and lies in memory as its weight does. Otherwise says false, and Python finds out what is different and whether
    // it is wrong.
    bool collect(StepPlan& plan, const pybind11::list& params, const pybind11::dict& state) const;

    // Whether the `i`-th parameter of a group in which all have gradients, and its state, are still what the plan has.
    bool holds(const StepPlan& plan, size_t i, const pybind11::list& params, const pybind11::dict& state) const;

    // Whether a tensor lies in memory as the `i`-th parameter does.
    bool ordered(size_t i, const View& tensor) const { return entries_.at(i).order.holds(tensor); }

   private:
    struct Tensor {
        pybind11::object object;
        const void* address;
    };
    struct Entry {
        Tensor param;
        Order order;
        bool moving;
        Py_hash_t hash;
        pybind11::object state;
        std::vector<Tensor> tensors;
    };
    bool holds(const Entry& entry, PyObject* param, Dtype dtype, int64_t numel, const pybind11::dict& state) const;

    std::vector<Entry> entries_;
    pybind11::tuple keys_;
    Exchange exchange_;
};

}  // namespace layerpipe
