// What a pass over memory computes for one element, whichever processor makes it: walk.h has a GPU's threads run it,
// cpu/span.cpp the CPU's loops.
//
// A pass has kSlots slots, each one number of the type T computed with. An element is read from arrays into the slots
// that reads() names, changed by the pass, and written to arrays from those that writes() names.
#pragma once

#include "group.h"

namespace layerpipe {

// One array: of any dtype in memory, null where there is none.
struct Array {
    void* base;
    Dtype dtype;
};

// Calls `f` with n as a constant, std::integral_constant<int, n>, of those from kLeast to kMost.
template <int kLeast, int kMost, class F>
auto with_constant(int n, const F& f) {
    if constexpr (kLeast < kMost)
        if (n != kMost) return with_constant<kLeast, kMost - 1>(n, f);
    return f(std::integral_constant<int, kMost>());
}

// kKept: how many states the group keeps; kWritesPast, kPredicts: whether it may have past weights and last updates.
template <class Rule_, int kKept, int kEmas, bool kWritesPast, bool kPredicts>
struct Step {
    using Rule = Rule_;
    using T = typename Rule::Number;
    static constexpr int kWeight = 0, kGrad = 1, kState = 2, kEma = kState + kKept, kPrevious = kEma + kEmas,
                         kPast = kPrevious + 1, kSlots = kPast + 1;
    static constexpr bool reads(int slot) {
        return slot == kWeight ? Rule::kUpdates : slot == kPrevious ? kPredicts : slot != kPast;
    }
    static constexpr bool writes(int slot) {
        return slot == kPast ? kWritesPast : slot == kPrevious ? kPredicts : slot != kGrad;
    }

    TensorScalars<Rule> s;

    LP_INLINE void operator()(T* x) const {
        T gradient = x[kGrad] * s.grad_factor;
        if (kPredicts) x[kWeight] = s.horizon.current(x[kWeight], x[kPrevious]);
        const T update = Rule::template step<kKept>(x[kWeight], gradient, x + kState, s.rule);
        if (kPredicts) x[kWeight] = s.horizon.predicted(x[kWeight], x[kPrevious] = update);
        const T past = keep_past<T, kEmas>(x[kWeight], update, gradient, x + kEma, s.past);
        if (kWritesPast) x[kPast] = past;
    }
};

// Past weights of one tensor: `out = weight + sum_k tap[k] term[k]`.
struct Reconstruction {
    Array out, weight;  // a float `weight` is the master of a narrower `out`
    int terms;
    Array term[kMaxTerms];  // of the type computed with, or bf16
    double tap[kMaxTerms];
    const float* taps_at;  // on a GPU, instead of `tap`
    int64_t numel;
};

template <class T_, int kTerms>
struct Reconstruct {
    using T = T_;
    static constexpr int kOut = 0, kWeight = 1, kTerm = 2, kSlots = kTerm + kTerms;
    static constexpr bool reads(int slot) { return slot != kOut; }
    static constexpr bool writes(int slot) { return slot == kOut; }

    T tap[kTerms + 1] = {};

    LP_INLINE explicit Reconstruct(const Reconstruction& work) {
        LP_UNROLL for (int k = 0; k < kTerms; ++k) tap[k] = T(work.taps_at ? work.taps_at[k] : work.tap[k]);
    }
    LP_INLINE void operator()(T* x) const {
        x[kOut] = x[kWeight];
        LP_UNROLL for (int k = 0; k < kTerms; ++k) x[kOut] = fused_multiply_add(tap[k], x[kTerm + k], x[kOut]);
    }
};

// The update of one tensor's averages.
struct Averages {
    Array ema[kMaxEmas];  // of the type computed with, or bf16
    double decay[kMaxEmas], turn;
    uint32_t key[kMaxEmas];  // of the random bits with which an average is rounded
    int emas;
    Array update;
    int64_t numel;
};

template <class T_, int kEmas>
struct Average {
    using T = T_;
    static constexpr int kUpdate = 0, kEma = 1, kSlots = kEma + kEmas;
    static constexpr bool reads(int) { return true; }
    static constexpr bool writes(int slot) { return slot != kUpdate; }

    T decay[kEmas], one_minus_decay[kEmas];
    Turn<T> turn;

    LP_INLINE explicit Average(const Averages& work) : turn(T(work.turn)) {
        LP_UNROLL for (int k = 0; k < kEmas; ++k) {
            decay[k] = T(work.decay[k]);
            one_minus_decay[k] = T(1.0 - work.decay[k]);
        }
    }
    LP_INLINE void operator()(T* x) const { ema_update<T, kEmas>(x + kEma, x[kUpdate], decay, one_minus_decay, turn); }
};

}  // namespace layerpipe
