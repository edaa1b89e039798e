// A parameter group in raw pointers: what both launchers and the code of one thread read.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "step.h"

namespace layerpipe {

// One parameter. Arithmetic is in float (in double for double weights), and so are `master` and `state`.
struct alignas(16) Record {
    void* weight;
    void* master;  // the weight in full precision, where `weight` is its rounded copy; else null
    void* state[kMaxStates];
    void* ema;       // averages one behind the other, `numel` apart; null without
    void* past;      // null unless the step writes the past weights
    void* previous;  // the last update, of the type of `state`, where `weight` is predicted; else null
    float* count;    // steps this parameter has made, where the rule depends on it; else null
    int64_t numel;
};

// What distinguishes one step from the next. Device pointers take precedence over the values beside them, so that a
// step needs no look at the device: a captured graph replays it, and a step that overflowed changes nothing.
struct Moment {
    double lr;
    const float* lr_at;
    int64_t t;       // updates of the group, this one included; 0 is long after its delay has filled
    int64_t* clock;  // updates before this one; counted up by the step
    const float* grad_scale;
    const float* found_inf;  // nonzero: change nothing
    double horizon;          // of weight prediction, in updates
    double horizon_before;   // which the weights in memory were predicted with
    float* horizon_at;       // instead of `horizon_before`; set to `horizon` by the step
};

LP_INLINE bool overflowed(const Moment& m) { return m.found_inf && *m.found_inf != 0.0f; }

// All that the arithmetic of one tensor needs besides its arrays.
template <class Rule>
struct TensorScalars {
    using T = typename Rule::Number;
    typename Rule::Scalars rule;
    PastScalars<T> past;
    Horizon<T> horizon;
    T grad_factor;
    uint32_t key[kMaxEmas];  // of the random bits with which an average is rounded
};

template <class Rule>
LP_INLINE TensorScalars<Rule> tensor_scalars(const typename Rule::Options& options,
                                             const PastDesign<typename Rule::Number>& design, int emas, const Moment& m,
                                             const Record& r, int tensor, bool first) {
    using T = typename Rule::Number;
    const T count = r.count ? T(*r.count) : T(0);
    TensorScalars<Rule> s;
    s.rule = Rule::at(options, m.lr_at ? T(*m.lr_at) : T(m.lr), count + T(1), r.count ? count == T(0) : first);
    s.past = past_at<T>(design, emas, m.clock ? *m.clock + 1 : m.t);
    s.horizon = {m.horizon_at ? T(*m.horizon_at) : T(m.horizon_before), T(m.horizon), Choice<T>(r.previous != nullptr)};
    s.grad_factor = m.grad_scale ? T(1) / T(*m.grad_scale) : T(1);
    LP_UNROLL for (int k = 0; k < emas; ++k) s.key[k] =
        hash32(s.past.key + static_cast<uint32_t>(tensor * kMaxEmas + k));
    return s;
}

}  // namespace layerpipe
