// One weight's optimizer step, EMA of updates and past-weight reconstruction, in registers.
//
//   g  = sign * grad / grad_scale          W, g, ... in float, or double where the weights are
//   SGD:  g += weight_decay * W            Adam: g += weight_decay * W   (unless decoupled)
//         v  = momentum v + (1 - dampening) g    m = beta1 m + (1 - beta1) g,  q = beta2 q + (1 - beta2) g^2
//         d  = nesterov ? g + momentum v : v     d = m / (sqrt(max q) / sqrt(1 - beta2^step) + eps) / (1 - beta1^step)
//         u  = lr * d                            u = lr * d (+ lr * weight_decay * W where decoupled)
// With a share b of the newest gradient in the direction (spike compensation), SGD's v in d is
// (1 - b) v + b (1 - dampening) / (1 - momentum) g, and Adam's m is (1 - b) m + b (1 - beta1^step) g.
// Direction: d is given in the gradient's place,  u = lr * d + lr * weight_decay * W
//
//   W   = W - u
//   E_k = decay_k E_k + (1 - decay_k) u           and if they turn,  E_0 += turn (u - E_1),  E_1 -= turn (u - E_0)
//   What = W + tap_update u + sum_k tap_k E_k     (an estimate of W some updates ago)
//
// With weight prediction memory holds F = W - p u_ and u_, the last update, p updates of which F is ahead of W: a step
// begins with W = F + p_before u_ and ends with F = W - p u, u_ = u. What is then F + tap_update u + sum_k tap_k E_k.
//
// SGD rounds in torch.optim.SGD's order, with its fused multiply-adds written out, so a float32 step equals torch's
// for-loop implementation bit for bit and does not depend on the compiler's contraction rules.
#pragma once

#include <cmath>
#include <cstdint>

#include "number.h"

namespace layerpipe {

constexpr int kMaxEmas = 3;
constexpr int kMaxStates = 3;
constexpr int kMaxTerms = 4;  // momentum buffer and EMAs

LP_INLINE float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LP_INLINE double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
LP_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LP_INLINE double square_root(double x) { return __builtin_sqrt(x); }
// 1 - exp(x), exact also where x is small: 1 - beta^step has lost half its digits when it is computed as written.
LP_INLINE float one_minus_exp(float x) { return -expm1f(x); }
LP_INLINE double one_minus_exp(double x) { return -expm1(x); }

// What of the past a step keeps, by design: the same for all parameters of a group and all steps.
template <class T>
struct PastDesign {
    int64_t delay;  // n: the first n updates are averaged evenly
    T decay[kMaxEmas], one_minus_decay[kMaxEmas], tap[kMaxEmas], tap_update;
    T fill_tap;    // with EMAs, the newest update's while the delay fills
    T fill_ratio;  // without EMAs, how one update was to the one after it while the delay fills
    uint32_t seed;
    bool ema_of_gradient;
    T turn;  // of the first two averages; 0 with fewer
};

// Whether the first two averages turn about the update, and by how much: together they are then one complex average.
template <class T>
struct Turn {
    T by;
    Choice<T> on;  // 0 * (u - E) would be NaN for an infinite u
    Turn() = default;
    LP_INLINE explicit Turn(T turn) : by(turn), on(turn != T(0)) {}
};

// The same after a number of updates.
template <class T>
struct PastScalars {
    T decay[kMaxEmas], one_minus_decay[kMaxEmas], tap[kMaxEmas], tap_update;
    Turn<T> turn;
    uint32_t key;
    Choice<T> gradient;  // or the update
};

// `t` counts updates from 1; 0 is long after the delay has filled. While t <= n every EMA is the mean of all updates,
// so that the sum of the updates, t times the mean, is exact; after that no update may weigh more than in that mean.
template <class T>
LP_INLINE PastScalars<T> past_at(const PastDesign<T>& d, int emas, int64_t t) {
    PastScalars<T> s;
    const bool filling = t > 0 && t <= d.delay;
    const T mean = t > 0 ? T(t - 1) / T(t) : T(1);
    LP_UNROLL for (int k = 0; k < emas; ++k) {
        const bool young = filling || mean < d.decay[k];
        s.decay[k] = young ? mean : d.decay[k];
        s.one_minus_decay[k] = young ? T(1) / T(t) : d.one_minus_decay[k];
        s.tap[k] = !filling ? d.tap[k] : k == 0 ? T(t) : T(0);
    }
    s.turn = Turn<T>(filling ? T(0) : d.turn);
    s.tap_update = filling && emas > 0 ? d.fill_tap : d.tap_update;
    if (filling && emas == 0 && d.tap_update != T(0)) {
        T sum = 0;
        for (int64_t i = 0; i < t; ++i) sum = fused_multiply_add(sum, d.fill_ratio, T(1));
        s.tap_update = sum;
    }
    s.key = hash32(d.seed ^ hash32(static_cast<uint32_t>(t)));
    s.gradient = Choice<T>(d.ema_of_gradient);
    return s;
}

template <class T, int kEmas>
LP_INLINE void ema_update(T* ema, T value, const T* decay, const T* one_minus_decay, const Turn<T>& turn) {
    const T from0 = kEmas > 1 ? value - ema[0] : T(0), from1 = kEmas > 1 ? value - ema[1] : T(0);
    LP_UNROLL for (int k = 0; k < kEmas; ++k) ema[k] = fused_multiply_add(value, one_minus_decay[k], decay[k] * ema[k]);
    if (kEmas > 1) {
        ema[0] = turn.on(fused_multiply_add(turn.by, from1, ema[0]), ema[0]);
        ema[1] = turn.on(fused_multiply_add(-turn.by, from0, ema[1]), ema[1]);
    }
}

template <class T, int kEmas>
LP_INLINE T keep_past(T weight, T update, T gradient, T* ema, const PastScalars<T>& s) {
    ema_update<T, kEmas>(ema, s.gradient(gradient, update), s.decay, s.one_minus_decay, s.turn);
    T past = fused_multiply_add(s.tap_update, update, weight);
    LP_UNROLL for (int k = 0; k < kEmas; ++k) past = fused_multiply_add(s.tap[k], ema[k], past);
    return past;
}

// By how many of the last update the weights in memory are ahead of W: before the step and after it.
template <class T>
struct Horizon {
    T before, after;
    Choice<T> on;  // 0 * u would be NaN for an infinite u
    LP_INLINE T current(T predicted, T previous) const {
        return on(fused_multiply_add(before, previous, predicted), predicted);
    }
    LP_INLINE T predicted(T weight, T update) const { return on(fused_multiply_add(-after, update, weight), weight); }
};

// A rule keeps kLeast to kStates arrays of state, the same number for all tensors of a group; kUpdates says whether it
// moves weights. Its `step` returns the update.
//
// I/O: read W, g, v; write W, v. `gradient` becomes g.
template <class T>
struct Sgd {
    using Number = T;
    static constexpr int kLeast = 0, kStates = 1;  // v
    static constexpr bool kUpdates = true;

    struct Options {
        T momentum, one_minus_dampening, weight_decay, sign;
        T of_v, of_g;  // the direction, where it is not v alone
        Choice<T> mixes, decay;
    };
    static constexpr int kOptions = 6;  // momentum, dampening, weight_decay, nesterov, maximize, newest_share
    static Options options(const double* o) {
        const bool nesterov = o[3] != 0;
        const double of_g = nesterov ? 1.0 : o[5] * (1.0 - o[1]) / (1.0 - o[0]);
        return {T(o[0]),
                T(1.0 - o[1]),
                T(o[2]),
                o[4] != 0 ? T(-1) : T(1),
                T(nesterov ? o[0] : 1.0 - o[5]),
                T(of_g),
                Choice<T>(nesterov || o[5] != 0),
                Choice<T>(o[2] != 0)};
    }

    struct Scalars {
        Options o;
        T lr;
        Choice<T> first;  // v holds nothing yet, whatever lies there
    };
    LP_INLINE static Scalars at(const Options& options, T lr, T, bool first) { return {options, lr, Choice<T>(first)}; }

    template <int kKept>
    LP_INLINE static T step(T& weight, T& gradient, T* state, const Scalars& s) {
        T g = s.o.sign * gradient;
        const T decayed = fused_multiply_add(weight, s.o.weight_decay, g);
        g = s.o.decay(decayed, g);  // 0 * W would be NaN for an infinite W
        gradient = g;
        T d = g;
        if constexpr (kKept > 0) {
            T& v = state[0];
            v = s.first(g, fused_multiply_add(g, s.o.one_minus_dampening, s.o.momentum * v));
            const T mixed = fused_multiply_add(v, s.o.of_v, s.o.of_g * g);
            d = s.o.mixes(mixed, v);
        }
        weight = fused_multiply_add(d, -s.lr, weight);
        return s.lr * d;
    }
};

// I/O: read W, g, m, q (and max q with AMSGrad); write W, m, q (and max q).
template <class T>
struct Adam {
    using Number = T;
    static constexpr int kLeast = 2, kStates = 3;  // m, q and, with AMSGrad, max q
    static constexpr bool kUpdates = true;

    struct Options {
        T beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay, sign;
        T newest_share, one_minus_share;
        Choice<T> decay, from_m, mixes;
        bool decoupled;
    };
    static constexpr int kOptions = 7;  // beta1, beta2, eps, weight_decay, decoupled, maximize, newest_share
    static Options options(const double* o) {
        const bool decoupled = o[4] != 0;
        return {T(o[0]),
                T(1.0 - o[0]),
                T(o[1]),
                T(1.0 - o[1]),
                T(std::log(o[0])),
                T(std::log(o[1])),
                T(o[2]),
                T(o[3]),
                o[5] != 0 ? T(-1) : T(1),
                T(o[6]),
                T(1.0 - o[6]),
                Choice<T>(!decoupled && o[3] != 0),
                Choice<T>(1.0 - o[0] < 0.5),
                Choice<T>(o[6] != 0),
                decoupled};
    }

    struct Scalars {
        Options o;
        T step_size, root_correction, keep, shrink, of_g;
    };
    LP_INLINE static Scalars at(const Options& o, T lr, T step, bool) {
        const T correction1 = one_minus_exp(step * o.log_beta1), correction2 = one_minus_exp(step * o.log_beta2);
        const T shrink = o.decoupled ? lr * o.weight_decay : T(0);
        return {o, lr / correction1, square_root(correction2), T(1) - shrink, shrink, o.newest_share * correction1};
    }

    // Before the step size.
    template <int kKept>
    LP_INLINE static T direction(T g, T* state, const Scalars& s) {
        T &m = state[0], &q = state[1];
        // From the end that is nearer, as torch's lerp does.
        const T from_m = fused_multiply_add(s.o.one_minus_beta1, g - m, m);
        const T from_g = fused_multiply_add(-s.o.beta1, g - m, g);
        m = s.o.from_m(from_m, from_g);
        q = fused_multiply_add(s.o.one_minus_beta2 * g, g, s.o.beta2 * q);
        T largest = q;
        if constexpr (kKept > 2) largest = state[2] = q <= state[2] ? state[2] : q;  // a NaN stays one
        const T mixed = fused_multiply_add(s.of_g, g, s.o.one_minus_share * m);
        return s.o.mixes(mixed, m) / (square_root(largest) / s.root_correction + s.o.eps);
    }

    template <int kKept>
    LP_INLINE static T step(T& weight, T& gradient, T* state, const Scalars& s) {
        T g = s.o.sign * gradient;
        const T decayed = fused_multiply_add(weight, s.o.weight_decay, g);
        g = s.o.decay(decayed, g);
        gradient = g;
        const T d = direction<kKept>(g, state, s);
        const T u = fused_multiply_add(s.step_size, d, s.shrink * weight);
        weight = fused_multiply_add(-s.step_size, d, s.keep * weight);
        return u;
    }
};

// What an update is made of where something else makes the weights' step of it: lr * d of Adam, without weight decay.
// I/O: read g, m, q; write m, q and, in the weight's place, the direction.
template <class T>
struct AdamDirection : Adam<T> {
    static constexpr int kLeast = 2, kStates = 2;
    static constexpr bool kUpdates = false;

    template <int kKept>
    LP_INLINE static T step(T& weight, T& gradient, T* state, const typename Adam<T>::Scalars& s) {
        weight = s.step_size * Adam<T>::template direction<kKept>(s.o.sign * gradient, state, s);
        return weight;
    }
};

// I/O: read W and, in the gradient's place, d; write W.
template <class T>
struct Direction {
    using Number = T;
    static constexpr int kLeast = 0, kStates = 0;
    static constexpr bool kUpdates = true;

    struct Options {
        T weight_decay;
    };
    static constexpr int kOptions = 1;
    static Options options(const double* o) { return {T(o[0])}; }

    struct Scalars {
        T lr, keep, shrink;
    };
    LP_INLINE static Scalars at(const Options& o, T lr, T, bool) {
        const T shrink = lr * o.weight_decay;
        return {lr, T(1) - shrink, shrink};
    }

    template <int>
    LP_INLINE static T step(T& weight, T& direction, T*, const Scalars& s) {
        const T u = fused_multiply_add(s.lr, direction, s.shrink * weight);
        weight = fused_multiply_add(-s.lr, direction, s.keep * weight);
        return u;
    }
};

}  // namespace layerpipe
