// Compiled once per instruction set with LP_ISA naming it; everything but the table stays in an unnamed namespace, so
// that the linker cannot merge a function compiled for one processor with its namesake compiled for another.
#include "span.h"

#include <algorithm>
#include <utility>

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

template <class S, class T>
void narrow(void* base, int64_t at, int64_t count, const T* from) {
    S* __restrict to = static_cast<S*>(base) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = round_to<S, float>(static_cast<float>(from[i]));
}

template <class T>
void narrow_stochastic(void* base, int64_t at, int64_t count, const T* from, uint32_t key) {
    bf16* __restrict to = static_cast<bf16*>(base) + at;
    for (int64_t i = 0; i < count; ++i)
        to[i] = round_stochastic(static_cast<float>(from[i]), hash32(key ^ static_cast<uint32_t>(at + i)));
}

// An array that fills a slot, is filled from it, or both.
struct Column {
    Array array;
    int slot;
    bool reads, writes;
    bool stochastic = false;
    uint32_t key = 0;
};

constexpr int kMaxSlots = 4 + kMaxStates + kMaxEmas;

// The columns of a pass, and the loop over its slots.
template <class T>
struct Columns {
    static constexpr Dtype kNative = DtypeOf<T>::value;
    Column list[kMaxSlots + 1];
    int count = 0;
    bool direct = true;  // every array is of the type computed with

    void add(const Column& column) {
        if (!column.array.base) return;
        list[count++] = column;
        direct = direct && column.array.dtype == kNative;
    }

    // Fills the slots for the elements from `at` on: pointers into arrays of the type computed with, else buffers.
    void stage(int64_t at, int64_t elements, T (*buffer)[kTile], T** slots) const {
        for (int c = 0; c < count; ++c) {
            const auto& [array, slot, reads, writes, stochastic, key] = list[c];
            T* const own = slots[slot] ? slots[slot] : buffer[slot];
            slots[slot] = array.dtype == kNative ? static_cast<T*>(array.base) + at : own;
            if (!reads || array.dtype == kNative) continue;
            if (array.dtype == Dtype::bf16)
                widen<T, bf16>(array.base, at, elements, own);
            else if (array.dtype == Dtype::f16)
                widen<T, f16>(array.base, at, elements, own);
            else
                widen<T, float>(array.base, at, elements, own);
        }
    }

    // Rounds slots to the arrays that are narrower.
    void unstage(int64_t at, int64_t elements, T* const* slots) const {
        for (int c = 0; c < count; ++c) {
            const auto& [array, slot, reads, writes, stochastic, key] = list[c];
            if (!writes || array.dtype == kNative) continue;
            if (stochastic)
                narrow_stochastic(array.base, at, elements, slots[slot], key);
            else if (array.dtype == Dtype::bf16)
                narrow<bf16>(array.base, at, elements, slots[slot]);
            else
                narrow<f16>(array.base, at, elements, slots[slot]);
        }
    }

    template <class Pass>
    void run(const Pass& pass, int64_t begin, int64_t end) const {
        run(loop<Pass>, &pass, begin, end);
    }

   private:
    template <class Pass>
    static void loop(const void* pass, T* const* slots, int64_t elements) {
        loop(*static_cast<const Pass*>(pass), slots, elements, std::make_index_sequence<Pass::kSlots>());
    }

    template <class Pass, size_t... J>
    static void loop(const Pass& given, T* const* slots, int64_t elements, std::index_sequence<J...>) {
        const Pass pass = given;
        T* const array[] = {slots[J]...};
        // The arrays do not overlap, and so many pointers are more than a compiler checks for itself.
        LP_INDEPENDENT
        for (int64_t i = 0; i < elements; ++i) {
            T x[] = {(Pass::reads(J) ? array[J][i] : T(0))...};
            pass(x);
            ((Pass::writes(J) ? void(array[J][i] = x[J]) : void()), ...);
        }
    }

    void run(void (*loop)(const void*, T* const*, int64_t), const void* pass, int64_t begin, int64_t end) const {
        T buffer[kMaxSlots][kTile];
        for (int64_t at = begin; at < end;) {
            const int64_t elements = direct ? end - at : std::min(end - at, kTile);
            T* slots[kMaxSlots] = {};
            stage(at, elements, buffer, slots);
            loop(pass, slots, elements);
            unstage(at, elements, slots);
            at += elements;
        }
    }
};

template <class Pass>
void run_step(const Record& r, const void* grads, const Layout& layout, const TensorScalars<typename Pass::Rule>& s,
              int64_t begin, int64_t end) {
    using T = typename Pass::T;
    constexpr Dtype kNative = DtypeOf<T>::value;
    const Dtype average = layout.average;
    Columns<T> columns;
    columns.add({{r.master, kNative}, Pass::kWeight, true, true});
    columns.add({{r.weight, layout.weight}, Pass::kWeight, Pass::Rule::kUpdates && !r.master, true});
    columns.add({{const_cast<void*>(grads), layout.grad}, Pass::kGrad, true, false});
    for (int slot = Pass::kState; slot < Pass::kEma; ++slot)
        columns.add({{r.state[slot - Pass::kState], kNative}, slot, true, true});
    for (int k = 0; k < Pass::kPrevious - Pass::kEma; ++k) {
        void* const base = static_cast<char*>(r.ema) + k * r.numel * size_of(average);
        columns.add({{base, average}, Pass::kEma + k, true, true, average == Dtype::bf16, s.key[k]});
    }
    columns.add({{r.previous, kNative}, Pass::kPrevious, true, true});
    columns.add({{r.past, layout.weight}, Pass::kPast, false, true});
    columns.run(Pass{s}, begin, end);
}

template <class Rule>
void step_span(const Record& r, const void* grads, const Layout& layout, const TensorScalars<Rule>& s, int64_t begin,
               int64_t end) {
    constexpr int kUpdates = Rule::kUpdates;
    with_constant<Rule::kLeast, Rule::kStates>(layout.states, [&](auto kept) {
        with_constant<0, kUpdates * kMaxEmas>(layout.emas, [&](auto emas) {
            with_constant<0, kUpdates>(r.past != nullptr, [&](auto past) {
                with_constant<0, kUpdates>(r.previous != nullptr, [&](auto predicts) {
                    run_step<Step<Rule, kept, emas, past != 0, predicts != 0>>(r, grads, layout, s, begin, end);
                });
            });
        });
    });
}

template <class T>
void reconstruct_span(const Reconstruction& work, int64_t begin, int64_t end) {
    with_constant<0, kMaxTerms>(work.terms, [&](auto terms) {
        using Pass = Reconstruct<T, terms>;
        Columns<T> columns;
        columns.add({work.out, Pass::kOut, false, true});
        columns.add({work.weight, Pass::kWeight, true, false});
        for (int k = 0; k < terms; ++k) columns.add({work.term[k], Pass::kTerm + k, true, false});
        columns.run(Pass(work), begin, end);
    });
}

template <class T>
void average_span(const Averages& work, int64_t begin, int64_t end) {
    if (!work.emas) return;
    with_constant<1, kMaxEmas>(work.emas, [&](auto emas) {
        using Pass = Average<T, emas>;
        Columns<T> columns;
        columns.add({work.update, Pass::kUpdate, true, false});
        for (int k = 0; k < emas; ++k)
            columns.add({work.ema[k], Pass::kEma + k, true, true, work.ema[k].dtype == Dtype::bf16, work.key[k]});
        columns.run(Pass(work), begin, end);
    });
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

template <class T>
constexpr StepSpans<T> kSteps = {step_span<Sgd<T>>, step_span<Adam<T>>, step_span<AdamDirection<T>>,
                                 step_span<Direction<T>>};

}  // namespace

extern const InstructionSet LP_CONCAT(instruction_set_, LP_ISA);
const InstructionSet LP_CONCAT(instruction_set_, LP_ISA) = {
    LP_STRING(LP_ISA),
    kSteps<float>,
    kSteps<double>,
    {reconstruct_span<float>, average_span<float>},
    {reconstruct_span<double>, average_span<double>},
    finite_span,
};

}  // namespace layerpipe
