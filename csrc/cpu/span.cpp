// Compiled once per instruction set with LP_ISA naming it; everything but the table stays in an unnamed namespace, so
// that the linker cannot merge a function compiled for one processor with its namesake compiled for another.
#include "span.h"

#define LP_STRING_(x) #x
#define LP_STRING(x) LP_STRING_(x)
#define LP_CONCAT_(a, b) a##b
#define LP_CONCAT(a, b) LP_CONCAT_(a, b)

namespace layerpipe {
namespace {

template <class T, bool kMomentum, bool kFirst, int kEmas, bool kPast>
void sgd_loop(const SgdArrays<T>& a, const SgdScalars<T>& scalars, int64_t begin, int64_t end) {
    const SgdScalars<T> s = scalars;
    T* __restrict w = a.weight;
    const T* __restrict g = a.grad;
    T* __restrict v = a.velocity;
    T* __restrict e0 = a.ema;
    T* __restrict e1 = kEmas > 1 ? a.ema + a.numel : nullptr;
    T* __restrict e2 = kEmas > 2 ? a.ema + 2 * a.numel : nullptr;
    T* __restrict past = a.past;
    for (int64_t i = begin; i < end; ++i) {
        T weight = w[i], velocity = kMomentum && !kFirst ? v[i] : T(0), ema[kMaxEmas];
        if (kEmas > 0) ema[0] = e0[i];
        if (kEmas > 1) ema[1] = e1[i];
        if (kEmas > 2) ema[2] = e2[i];
        const T estimate = sgd<T, kMomentum, kFirst, kEmas>(weight, g[i], velocity, ema, s);
        w[i] = weight;
        if (kMomentum) v[i] = velocity;
        if (kEmas > 0) e0[i] = ema[0];
        if (kEmas > 1) e1[i] = ema[1];
        if (kEmas > 2) e2[i] = ema[2];
        if (kPast) past[i] = estimate;
    }
}

template <class T, bool kMomentum, bool kFirst, int kEmas>
void sgd_past(const SgdArrays<T>& a, const SgdScalars<T>& s, int64_t begin, int64_t end) {
    if (a.past)
        sgd_loop<T, kMomentum, kFirst, kEmas, true>(a, s, begin, end);
    else
        sgd_loop<T, kMomentum, kFirst, kEmas, false>(a, s, begin, end);
}

template <class T, int kEmas>
void sgd_momentum(const SgdArrays<T>& a, const SgdScalars<T>& s, int64_t begin, int64_t end) {
    if (!a.velocity)
        sgd_past<T, false, false, kEmas>(a, s, begin, end);
    else if (a.first)
        sgd_past<T, true, true, kEmas>(a, s, begin, end);
    else
        sgd_past<T, true, false, kEmas>(a, s, begin, end);
}

template <class T>
void sgd_span(const SgdArrays<T>& a, const SgdScalars<T>& s, int64_t begin, int64_t end) {
    switch (a.emas) {
        case 0: return sgd_momentum<T, 0>(a, s, begin, end);
        case 1: return sgd_momentum<T, 1>(a, s, begin, end);
        case 2: return sgd_momentum<T, 2>(a, s, begin, end);
        default: return sgd_momentum<T, 3>(a, s, begin, end);
    }
}

template <class T>
void ema_span(const EmaArrays<T>& a, int64_t begin, int64_t end) {
    for (int k = 0; k < a.emas; ++k) {
        T* __restrict e = a.ema[k];
        const T* __restrict u = a.update;
        const T decay = a.decay[k], rest = a.one_minus_decay[k];
        for (int64_t i = begin; i < end; ++i) ema_update<T, 1>(e + i, u[i], &decay, &rest);
    }
}

template <class T, int kTerms>
void reconstruct_loop(const Reconstruction<T>& r, int64_t begin, int64_t end) {
    T* __restrict out = r.out;
    const T* w = r.weight;
    const T *t0 = r.term[0], *t1 = r.term[1], *t2 = r.term[2], *t3 = r.term[3];
    const T a0 = r.tap[0], a1 = r.tap[1], a2 = r.tap[2], a3 = r.tap[3];
    for (int64_t i = begin; i < end; ++i) {
        T past = w[i];
        if (kTerms > 0) past = fused_multiply_add(a0, t0[i], past);
        if (kTerms > 1) past = fused_multiply_add(a1, t1[i], past);
        if (kTerms > 2) past = fused_multiply_add(a2, t2[i], past);
        if (kTerms > 3) past = fused_multiply_add(a3, t3[i], past);
        out[i] = past;
    }
}

template <class T>
void reconstruct_span(const Reconstruction<T>& r, int64_t begin, int64_t end) {
    switch (r.terms) {
        case 0: return reconstruct_loop<T, 0>(r, begin, end);
        case 1: return reconstruct_loop<T, 1>(r, begin, end);
        case 2: return reconstruct_loop<T, 2>(r, begin, end);
        case 3: return reconstruct_loop<T, 3>(r, begin, end);
        default: return reconstruct_loop<T, 4>(r, begin, end);
    }
}

}  // namespace

extern const InstructionSet LP_CONCAT(instruction_set_, LP_ISA);
const InstructionSet LP_CONCAT(instruction_set_, LP_ISA) = {
    LP_STRING(LP_ISA),
    {sgd_span<float>, ema_span<float>, reconstruct_span<float>},
    {sgd_span<double>, ema_span<double>, reconstruct_span<double>},
};

}  // namespace layerpipe
