// The loops over a contiguous span of elements, one copy per instruction set, picked once at run time.
#pragma once

#include <cstdint>

#include "../group.h"

namespace layerpipe {

// What the arrays of a group hold. `state` and `master` are of the type that is computed with.
struct Layout {
    Dtype weight, grad, average;
    int emas;
};

// One array as the loop sees it: of any dtype in memory.
struct Array {
    void* base;
    Dtype dtype;
};

struct Reconstruction {
    Array out, weight;
    Array term[kMaxTerms];
    double tap[kMaxTerms];
    int terms;
};

struct Averages {
    Array ema[kMaxEmas];
    double decay[kMaxEmas], one_minus_decay[kMaxEmas], turn;
    uint32_t key[kMaxEmas];
    int emas;
    Array update;
};

template <class Rule>
using StepSpan = void (*)(const Record&, const void* grads, const Layout&, const TensorScalars<Rule>&, int64_t begin,
                          int64_t end);

template <class T>
struct SpanKernels {
    StepSpan<Sgd<T>> sgd;
    StepSpan<Adam<T>> adam;
    StepSpan<AdamDirection<T>> adam_direction;
    StepSpan<Direction<T>> direction;
    void (*reconstruct)(const Reconstruction&, int64_t begin, int64_t end);
    void (*average)(const Averages&, int64_t begin, int64_t end);
};

struct InstructionSet {
    const char* name;
    SpanKernels<float> f32;
    SpanKernels<double> f64;
    bool (*finite)(const void* array, Dtype dtype, int64_t numel);
};

const InstructionSet& instruction_set();

}  // namespace layerpipe
