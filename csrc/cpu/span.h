// The loops over a contiguous span of elements, one copy per instruction set, picked once at run time.
#pragma once

#include <cstdint>
#include <tuple>

#include "../pass.h"

namespace layerpipe {

// What the arrays of a group hold. `state`, `previous` and `master` are of the type that is computed with.
struct Layout {
    Dtype weight, grad, average;
    int states, emas;
};

template <class Rule>
using StepSpan = void (*)(const Record&, const void* grads, const Layout&, const TensorScalars<Rule>&, int64_t begin,
                          int64_t end);

template <class T>
struct TensorSpans {
    void (*reconstruct)(const Reconstruction&, int64_t begin, int64_t end);
    void (*average)(const Averages&, int64_t begin, int64_t end);
};

template <class T>
using StepSpans = std::tuple<StepSpan<Sgd<T>>, StepSpan<Adam<T>>, StepSpan<AdamDirection<T>>, StepSpan<Direction<T>>>;

struct InstructionSet {
    const char* name;
    StepSpans<float> f32_steps;
    StepSpans<double> f64_steps;
    TensorSpans<float> f32;
    TensorSpans<double> f64;
    bool (*finite)(const void* array, Dtype dtype, int64_t numel);

    template <class Rule>
    StepSpan<Rule> step() const {
        if constexpr (sizeof(typename Rule::Number) == 4)
            return std::get<StepSpan<Rule>>(f32_steps);
        else
            return std::get<StepSpan<Rule>>(f64_steps);
    }
};

const InstructionSet& instruction_set();

}  // namespace layerpipe
