// The loops over a contiguous span of elements, one copy per instruction set, picked once at run time.
#pragma once

#include <cstdint>

#include "../step.h"

namespace layerpipe {

template <class T>
struct SgdArrays {
    T* weight;
    const T* grad;
    T* velocity;  // null without momentum
    T* ema;       // kEmas arrays, one behind the other, `numel` apart; null without EMAs
    T* past;      // null unless the step materializes the past weights
    int64_t numel;
    int emas;
    bool first;  // no velocity yet
};

template <class T>
struct Reconstruction {
    T* out;
    const T* weight;
    const T* term[kMaxTerms];
    T tap[kMaxTerms];
    int terms;
};

template <class T>
struct EmaArrays {
    T* ema[kMaxEmas];
    T decay[kMaxEmas], one_minus_decay[kMaxEmas];
    int emas;
    const T* update;
};

template <class T>
struct SpanKernels {
    void (*sgd)(const SgdArrays<T>&, const SgdScalars<T>&, int64_t begin, int64_t end);
    void (*ema)(const EmaArrays<T>&, int64_t begin, int64_t end);
    void (*reconstruct)(const Reconstruction<T>&, int64_t begin, int64_t end);
};

struct InstructionSet {
    const char* name;
    SpanKernels<float> f32;
    SpanKernels<double> f64;
};

const InstructionSet& instruction_set();

}  // namespace layerpipe
