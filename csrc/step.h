// One weight's optimizer step, EMA of updates and past-weight reconstruction, in registers.
//
//   g  = sign * grad + weight_decay * W
//   v  = momentum * v + (1 - dampening) * g        (v = g in the first step)
//   d  = nesterov ? g + momentum * v : v           (d = g without momentum)
//   u  = lr * d,   W = W - u
//   E_k = decay_k * E_k + (1 - decay_k) * u
//   What = W + tap_update * u + sum_k tap_k * E_k  (an estimate of W some updates ago)
//
// The order of roundings is torch.optim.SGD's, with its fused multiply-adds written out, so a float32 step equals
// torch's for-loop implementation bit for bit and does not depend on the compiler's contraction rules.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LP_INLINE __host__ __device__ __forceinline__
#else
#define LP_INLINE inline __attribute__((always_inline))
#endif

namespace layerpipe {

constexpr int kMaxEmas = 3;
constexpr int kMaxTerms = 4;  // momentum buffer and EMAs

LP_INLINE float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
LP_INLINE double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// What one step needs besides the arrays. Uniform over a parameter group.
template <class T>
struct SgdScalars {
    T lr, momentum, one_minus_dampening, weight_decay, sign;
    T decay[kMaxEmas], one_minus_decay[kMaxEmas], tap[kMaxEmas], tap_update;
    bool nesterov, ema_of_gradient;
};

template <class T, int kEmas>
LP_INLINE void ema_update(T* ema, T value, const T* decay, const T* one_minus_decay) {
    for (int k = 0; k < kEmas; ++k) ema[k] = fused_multiply_add(value, one_minus_decay[k], decay[k] * ema[k]);
}

// I/O: read W, g, v, E_k; write W, v, E_k (and the returned What, where the caller stores it).
template <class T, bool kMomentum, bool kFirst, int kEmas>
LP_INLINE T sgd(T& weight, T grad, T& velocity, T* ema, const SgdScalars<T>& s) {
    T g = s.sign * grad;
    if (s.weight_decay != T(0)) g = fused_multiply_add(weight, s.weight_decay, g);
    T d = g;
    if (kMomentum) {
        velocity = kFirst ? g : fused_multiply_add(g, s.one_minus_dampening, s.momentum * velocity);
        d = s.nesterov ? fused_multiply_add(velocity, s.momentum, g) : velocity;
    }
    weight = fused_multiply_add(d, -s.lr, weight);
    const T u = s.lr * d;
    ema_update<T, kEmas>(ema, s.ema_of_gradient ? g : u, s.decay, s.one_minus_decay);
    T past = fused_multiply_add(s.tap_update, u, weight);
    for (int k = 0; k < kEmas; ++k) past = fused_multiply_add(s.tap[k], ema[k], past);
    return past;
}

}  // namespace layerpipe
