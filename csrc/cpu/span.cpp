// Compiled once per instruction set with LP_ISA naming it; everything but the table stays in an unnamed namespace, so
// that the linker cannot merge a function compiled for one processor with its namesake compiled for another.
#include "span.h"

#include <algorithm>

#define LP_STRING_(x) #x
#define LP_STRING(x) LP_STRING_(x)
#define LP_CONCAT_(a, b) a##b
#define LP_CONCAT(a, b) LP_CONCAT_(a, b)

#if defined(__clang__)
#define LP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LP_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace layerpipe {
namespace {

// Arrays that are not of the type computed with pass through a buffer that stays in the first-level cache.
constexpr int64_t kTile = 512;

template <class T, class S>
void widen(const void* base, int64_t at, int64_t count, T* to) {
    const S* __restrict from = static_cast<const S*>(base) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(to_compute(from[i]));
}

template <class T>
T* stage(const Array& array, int64_t at, int64_t count, T* buffer) {
    if (!array.base) return nullptr;
    if (array.dtype == DtypeOf<T>::value) return static_cast<T*>(array.base) + at;
    switch (array.dtype) {
        case Dtype::bf16: widen<T, bf16>(array.base, at, count, buffer); break;
        case Dtype::f16: widen<T, f16>(array.base, at, count, buffer); break;
        case Dtype::f32: widen<T, float>(array.base, at, count, buffer); break;
        default: break;
    }
    return buffer;
}

// Where a result goes that the loop does not read: straight into the array, or into a buffer first.
template <class T>
T* destination(const Array& array, int64_t at, T* buffer) {
    if (!array.base) return nullptr;
    return array.dtype == DtypeOf<T>::value ? static_cast<T*>(array.base) + at : buffer;
}

template <class S, class T>
void narrow(const Array& array, int64_t at, int64_t count, const T* from) {
    S* __restrict to = static_cast<S*>(array.base) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = round_to<S, float>(static_cast<float>(from[i]));
}

template <class T>
void unstage(const Array& array, int64_t at, int64_t count, const T* from) {
    if (!array.base || array.dtype == DtypeOf<T>::value) return;
    if (array.dtype == Dtype::bf16)
        narrow<bf16>(array, at, count, from);
    else if (array.dtype == Dtype::f16)
        narrow<f16>(array, at, count, from);
}

template <class T>
void unstage_stochastic(const Array& array, int64_t at, int64_t count, const T* from, uint32_t key) {
    if (!array.base || array.dtype != Dtype::bf16) return;
    bf16* __restrict to = static_cast<bf16*>(array.base) + at;
    for (int64_t i = 0; i < count; ++i)
        to[i] = round_stochastic(static_cast<float>(from[i]), hash32(key ^ static_cast<uint32_t>(at + i)));
}

template <class T>
struct Spans {
    T* weight;
    const T* grad;
    T* state[kMaxStates];
    T* ema[kMaxEmas];
    T* past;
    T* previous;
};

template <class Rule, int kForm, int kEmas, bool kPast, bool kPredicts>
void step_loop(const Spans<typename Rule::Number>& a, const TensorScalars<Rule>& scalars, int64_t count) {
    using T = typename Rule::Number;
    const TensorScalars<Rule> s = scalars;
    T* __restrict w = a.weight;
    const T* __restrict g = a.grad;
    T* __restrict s0 = a.state[0];
    T* __restrict s1 = a.state[1];
    T* __restrict s2 = a.state[2];
    T* __restrict e0 = a.ema[0];
    T* __restrict e1 = a.ema[1];
    T* __restrict e2 = a.ema[2];
    T* __restrict past = a.past;
    T* __restrict previous = a.previous;
    constexpr int kStates = Rule::states(kForm);
    constexpr bool kRead = Rule::reads(kForm);
    // The arrays do not overlap, and so many pointers are more than a compiler checks for itself.
    LP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
        T weight = Rule::kUpdates ? w[i] : T(0), gradient = g[i] * s.grad_factor, state[kMaxStates] = {},
          ema[kMaxEmas] = {};
        if (kStates > 0 && kRead) state[0] = s0[i];
        if (kStates > 1) state[1] = s1[i];
        if (kStates > 2) state[2] = s2[i];
        if (kEmas > 0) ema[0] = e0[i];
        if (kEmas > 1) ema[1] = e1[i];
        if (kEmas > 2) ema[2] = e2[i];
        if (kPredicts) weight = s.horizon.current(weight, previous[i]);
        const T update = Rule::step(weight, gradient, state, s.rule, kForm);
        if (kPredicts) weight = s.horizon.predicted(weight, previous[i] = update);
        const T estimate = keep_past<T, kEmas>(weight, update, gradient, ema, s.past);
        w[i] = weight;
        if (kStates > 0) s0[i] = state[0];
        if (kStates > 1) s1[i] = state[1];
        if (kStates > 2) s2[i] = state[2];
        if (kEmas > 0) e0[i] = ema[0];
        if (kEmas > 1) e1[i] = ema[1];
        if (kEmas > 2) e2[i] = ema[2];
        if (kPast) past[i] = estimate;
    }
}

template <class Rule>
using Loop = void (*)(const Spans<typename Rule::Number>&, const TensorScalars<Rule>&, int64_t count);

template <class Rule, int kForm, bool kPredicts>
Loop<Rule> loop_of(int emas, bool past) {
    static constexpr Loop<Rule> loops[kMaxEmas + 1][2] = {
        {step_loop<Rule, kForm, 0, false, kPredicts>, step_loop<Rule, kForm, 0, true, kPredicts>},
        {step_loop<Rule, kForm, 1, false, kPredicts>, step_loop<Rule, kForm, 1, true, kPredicts>},
        {step_loop<Rule, kForm, 2, false, kPredicts>, step_loop<Rule, kForm, 2, true, kPredicts>},
        {step_loop<Rule, kForm, 3, false, kPredicts>, step_loop<Rule, kForm, 3, true, kPredicts>},
    };
    return loops[emas][past];
}

template <class Rule, int kForm = 0>
Loop<Rule> choose(int form, int emas, bool past, bool predicts) {
    if constexpr (!Rule::kUpdates) {
        return step_loop<Rule, kForm, 0, false, false>;
    } else {
        if constexpr (kForm + 1 < Rule::kForms)
            if (form != kForm) return choose<Rule, kForm + 1>(form, emas, past, predicts);
        return predicts ? loop_of<Rule, kForm, true>(emas, past) : loop_of<Rule, kForm, false>(emas, past);
    }
}

template <class Rule>
void step_span(const Record& r, const void* grads, const Layout& layout, const TensorScalars<Rule>& s, int64_t begin,
               int64_t end) {
    using T = typename Rule::Number;
    constexpr Dtype kNative = DtypeOf<T>::value;
    const bool direct = layout.weight == kNative && layout.grad == kNative && layout.average == kNative;
    const Loop<Rule> loop = choose<Rule>(s.form, layout.emas, r.past != nullptr, r.previous != nullptr);
    const Array weight{r.weight, layout.weight}, past{r.past, layout.weight};
    const Array source = r.master ? Array{r.master, kNative} : weight;
    const Array grad{const_cast<void*>(grads), layout.grad};
    T buffer[3 + kMaxEmas][kTile];
    for (int64_t at = begin; at < end;) {
        const int64_t count = direct ? end - at : std::min(end - at, kTile);
        Spans<T> a{};
        a.weight = stage(source, at, count, buffer[0]);
        a.grad = stage(grad, at, count, buffer[1]);
        a.past = destination(past, at, buffer[2]);
        a.previous = r.previous ? static_cast<T*>(r.previous) + at : nullptr;
        for (int j = 0; j < Rule::kStates; ++j) a.state[j] = r.state[j] ? static_cast<T*>(r.state[j]) + at : nullptr;
        for (int k = 0; k < layout.emas; ++k)
            a.ema[k] = stage(Array{r.ema, layout.average}, at + k * r.numel, count, buffer[3 + k]);
        loop(a, s, count);
        unstage(weight, at, count, a.weight);
        unstage(past, at, count, a.past);
        for (int k = 0; k < layout.emas; ++k) {
            const Array average{static_cast<char*>(r.ema) + k * r.numel * size_of(layout.average), layout.average};
            unstage_stochastic(average, at, count, a.ema[k], s.key[k]);
        }
        at += count;
    }
}

template <class T, int kTerms>
void reconstruct_loop(T* __restrict out, const T* w, const T* const* term, const T* tap, int64_t count) {
    const T *t0 = term[0], *t1 = term[1], *t2 = term[2], *t3 = term[3];
    const T a0 = tap[0], a1 = tap[1], a2 = tap[2], a3 = tap[3];
    for (int64_t i = 0; i < count; ++i) {
        T past = w[i];
        if (kTerms > 0) past = fused_multiply_add(a0, t0[i], past);
        if (kTerms > 1) past = fused_multiply_add(a1, t1[i], past);
        if (kTerms > 2) past = fused_multiply_add(a2, t2[i], past);
        if (kTerms > 3) past = fused_multiply_add(a3, t3[i], past);
        out[i] = past;
    }
}

template <class T>
void reconstruct_span(const Reconstruction& r, int64_t begin, int64_t end) {
    constexpr Dtype kNative = DtypeOf<T>::value;
    static constexpr decltype(&reconstruct_loop<T, 0>) loops[kMaxTerms + 1] = {
        reconstruct_loop<T, 0>, reconstruct_loop<T, 1>, reconstruct_loop<T, 2>,
        reconstruct_loop<T, 3>, reconstruct_loop<T, 4>,
    };
    bool direct = r.out.dtype == kNative && r.weight.dtype == kNative;
    for (int k = 0; k < r.terms; ++k) direct = direct && r.term[k].dtype == kNative;
    T buffer[2 + kMaxTerms][kTile], tap[kMaxTerms];
    for (int k = 0; k < kMaxTerms; ++k) tap[k] = k < r.terms ? static_cast<T>(r.tap[k]) : T(0);
    for (int64_t at = begin; at < end;) {
        const int64_t count = direct ? end - at : std::min(end - at, kTile);
        const T* term[kMaxTerms] = {};
        for (int k = 0; k < r.terms; ++k) term[k] = stage(r.term[k], at, count, buffer[2 + k]);
        T* out = destination(r.out, at, buffer[0]);
        loops[r.terms](out, stage(r.weight, at, count, buffer[1]), term, tap, count);
        unstage(r.out, at, count, out);
        at += count;
    }
}

template <class T, int kEmas>
void average_loop(T* const* ema, const T* u, const Averages& a, int64_t count) {
    T* __restrict e0 = ema[0];
    T* __restrict e1 = ema[1];
    T* __restrict e2 = ema[2];
    T decay[kMaxEmas], rest[kMaxEmas];
    for (int k = 0; k < kMaxEmas; ++k)
        decay[k] = static_cast<T>(a.decay[k]), rest[k] = static_cast<T>(a.one_minus_decay[k]);
    const Turn<T> turn(static_cast<T>(a.turn));
    LP_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
        T e[kMaxEmas] = {e0[i]};
        if (kEmas > 1) e[1] = e1[i];
        if (kEmas > 2) e[2] = e2[i];
        ema_update<T, kEmas>(e, u[i], decay, rest, turn);
        e0[i] = e[0];
        if (kEmas > 1) e1[i] = e[1];
        if (kEmas > 2) e2[i] = e[2];
    }
}

template <class T>
void average_span(const Averages& a, int64_t begin, int64_t end) {
    static constexpr decltype(&average_loop<T, 1>) loops[kMaxEmas] = {average_loop<T, 1>, average_loop<T, 2>,
                                                                      average_loop<T, 3>};
    T update_buffer[kTile], buffer[kMaxEmas][kTile];
    if (!a.emas) return;
    for (int64_t at = begin; at < end; at += kTile) {
        const int64_t count = std::min(end - at, kTile);
        T* e[kMaxEmas] = {};
        for (int k = 0; k < a.emas; ++k) e[k] = stage(a.ema[k], at, count, buffer[k]);
        loops[a.emas - 1](e, stage(a.update, at, count, update_buffer), a, count);
        for (int k = 0; k < a.emas; ++k) unstage_stochastic(a.ema[k], at, count, e[k], a.key[k]);
    }
}

// Infinity and NaN have all bits of the exponent; a sum would tell them, too, but may overflow by itself.
template <class Bits>
bool finite_bits(const void* array, Bits exponent, int64_t numel) {
    const auto* bits = static_cast<const Bits*>(array);
    Bits found = 0;
    for (int64_t i = 0; i < numel; ++i) found |= (bits[i] & exponent) == exponent;
    return !found;
}

bool finite_span(const void* array, Dtype dtype, int64_t numel) {
    switch (dtype) {
        case Dtype::f64: return finite_bits<uint64_t>(array, 0x7ff0000000000000u, numel);
        case Dtype::f32: return finite_bits<uint32_t>(array, 0x7f800000u, numel);
        case Dtype::bf16: return finite_bits<uint16_t>(array, 0x7f80u, numel);
        case Dtype::f16: return finite_bits<uint16_t>(array, 0x7c00u, numel);
    }
    return false;
}

}  // namespace

extern const InstructionSet LP_CONCAT(instruction_set_, LP_ISA);
const InstructionSet LP_CONCAT(instruction_set_, LP_ISA) = {
    LP_STRING(LP_ISA),
    {step_span<Sgd<float>>, step_span<Adam<float>>, step_span<AdamDirection<float>>, step_span<Direction<float>>,
     reconstruct_span<float>, average_span<float>},
    {step_span<Sgd<double>>, step_span<Adam<double>>, step_span<AdamDirection<double>>, step_span<Direction<double>>,
     reconstruct_span<double>, average_span<double>},
    finite_span,
};

}  // namespace layerpipe
