// What one thread of a GPU does: its share of a chunk, in packs of 16 bytes. Compiled for the host as well, where tests
// run it in a loop over blocks and threads.
#pragma once

#include <type_traits>

#include "group.h"

namespace layerpipe {

constexpr int kThreads = 256;
constexpr int64_t kGpuChunk = 1 << 13;
constexpr int kMaxGrads = 400;  // what fits into a kernel's 4 KB of arguments, everything else included

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

// One access of 2, 4 or 16 bytes. The intrinsics also tell the compiler what it cannot know of a pointer that was
// itself loaded: that it points to global memory. Everything is read once per step, so loads are streamed.
template <class Word>
LP_INLINE Word read(const Word* p) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Word) == 16) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
        return {{v.x, v.y, v.z, v.w}};
    } else {
        return __ldcs(p);
    }
#else
    return *p;
#endif
}

template <bool kStreaming, class Word>
LP_INLINE void write(Word* p, Word v) {
#if defined(__CUDA_ARCH__)
    if constexpr (!kStreaming) {
        __builtin_assume(__isGlobal(p));
        *p = v;
    } else if constexpr (sizeof(Word) == 16) {
        __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
    } else {
        __stcs(p, v);
    }
#else
    *p = v;
#endif
}

// A pack of N elements of S is N * sizeof(S) / 16 words, a multiple of 16 bytes; a pack of one is one element.
template <class S, int N>
struct Packing {
    using Word = std::conditional_t<N != 1, Bytes16, std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>>;
    static constexpr int kPer = sizeof(Word) / sizeof(S), kWords = N / kPer;
    static_assert(N % kPer == 0, "packs are whole multiples of 16 bytes");
};

// N elements of S from memory into floats.
template <class S, int N>
LP_INLINE void load(const void* base, int64_t at, float* to) {
    using P = Packing<S, N>;
    const auto* from = reinterpret_cast<const typename P::Word*>(static_cast<const S*>(base) + at);
    LP_UNROLL for (int p = 0; p < P::kWords; ++p) {
        S values[P::kPer];
        const typename P::Word word = read(from + p);
        memcpy(values, &word, sizeof(word));
        LP_UNROLL for (int j = 0; j < P::kPer; ++j) to[p * P::kPer + j] = to_compute(values[j]);
    }
}

struct Nearest {
    template <class S>
    LP_INLINE S round(float x, int64_t) const {
        return round_to<S, float>(x);
    }
};

// The random bits of an element depend on the seed, the update, the tensor, the average and the element alone.
struct Stochastic {
    uint32_t key;
    template <class S>
    LP_INLINE S round(float x, int64_t at) const {
        return round_stochastic(x, hash32(key ^ static_cast<uint32_t>(at)));
    }
};

// Weights and past weights are what the next forward and backward read; everything else is not touched before the next
// step, and leaves with a streaming hint.
template <class S, int N, bool kStreaming, class Rounding>
LP_INLINE void store(void* base, int64_t at, const float* from, const Rounding& rounding) {
    using P = Packing<S, N>;
    auto* to = reinterpret_cast<typename P::Word*>(static_cast<S*>(base) + at);
    LP_UNROLL for (int p = 0; p < P::kWords; ++p) {
        S values[P::kPer];
        LP_UNROLL for (int j = 0; j < P::kPer; ++j) values[j] =
            rounding.template round<S>(from[p * P::kPer + j], at + p * P::kPer + j);
        typename P::Word word;
        memcpy(&word, values, sizeof(word));
        write<kStreaming>(to + p, word);
    }
}

// The kernel's argument.
template <class Rule>
struct StepArgs {
    typename Rule::Options options;
    PastDesign<float> design;
    Moment moment;
    const Record* records;
    const Chunk* chunks;
    uint32_t* blocks_done;  // 0 before and after; null where nothing is counted
    int32_t tensors, first_tensor;
    int32_t float_grads;                    // gradients are float though the weights are not
    int32_t advance_clock;                  // the last of a step's launches
    uint32_t first[(kMaxGrads + 31) / 32];  // bit i: the state of tensor i holds nothing yet
    const void* grads[kMaxGrads];           // of tensors first_tensor, first_tensor + 1, ...
};

// W: weights, E: averages. I/O: read W or master, g, states, E_k; write W, master, states, E_k, and What if asked for;
// read and write u_ where weights are predicted.
template <class Rule, class W, class E, int kEmas, int N>
LP_INLINE void step_pack(const Record& r, const void* grads, bool float_grads, int64_t at,
                         const TensorScalars<Rule>& s) {
    constexpr int kStates = Rule::kStates ? Rule::kStates : 1;  // of the arrays that C++ wants to have elements
    float w[N], g[N], previous[N], state[kStates][N], ema[kEmas ? kEmas : 1][N];
    const bool master = sizeof(W) == 2 && r.master;
    if (master)
        load<float, N>(r.master, at, w);
    else if (Rule::kUpdates)
        load<W, N>(r.weight, at, w);
    if (Rule::kUpdates && r.previous) {
        load<float, N>(r.previous, at, previous);
        LP_UNROLL for (int i = 0; i < N; ++i) w[i] = s.horizon.current(w[i], previous[i]);
    }
    if (sizeof(W) == 4 || float_grads)
        load<float, N>(grads, at, g);
    else
        load<W, N>(grads, at, g);
    LP_UNROLL for (int j = 0; j < Rule::kStates; ++j) {
        if (r.state[j])
            load<float, N>(r.state[j], at, state[j]);
        else
            LP_UNROLL for (int i = 0; i < N; ++i) state[j][i] = 0;
    }
    LP_UNROLL for (int k = 0; k < kEmas; ++k) load<E, N>(r.ema, at + k * r.numel, ema[k]);

    LP_UNROLL for (int i = 0; i < N; ++i) {
        float own[kStates], averages[kEmas ? kEmas : 1];
        LP_UNROLL for (int j = 0; j < Rule::kStates; ++j) own[j] = state[j][i];
        LP_UNROLL for (int k = 0; k < kEmas; ++k) averages[k] = ema[k][i];
        float gradient = g[i] * s.grad_factor;
        const float update = previous[i] = Rule::step(w[i], gradient, own, s.rule, s.form);
        if (Rule::kUpdates && r.previous) w[i] = s.horizon.predicted(w[i], update);
        g[i] = keep_past<float, kEmas>(w[i], update, gradient, averages, s.past);
        LP_UNROLL for (int j = 0; j < Rule::kStates; ++j) state[j][i] = own[j];
        LP_UNROLL for (int k = 0; k < kEmas; ++k) ema[k][i] = averages[k];
    }

    store<W, N, false>(r.weight, at, w, Nearest{});
    if (master) store<float, N, true>(r.master, at, w, Nearest{});
    LP_UNROLL for (int j = 0; j < Rule::kStates; ++j) if (r.state[j])
        store<float, N, true>(r.state[j], at, state[j], Nearest{});
    if (Rule::kUpdates && r.previous) store<float, N, true>(r.previous, at, previous, Nearest{});
    LP_UNROLL for (int k = 0; k < kEmas; ++k) {
        void* average = static_cast<E*>(r.ema) + k * r.numel;
        if constexpr (sizeof(E) == 2)
            store<E, N, true>(average, at, ema[k], Stochastic{s.key[k]});
        else
            store<E, N, true>(average, at, ema[k], Nearest{});
    }
    if (r.past) store<W, N, false>(r.past, at, g, Nearest{});
}

// Everything of one chunk that belongs to one thread.
template <class Rule, class W, class E, int kEmas>
LP_INLINE void step_chunk(const StepArgs<Rule>& a, const Chunk& c, int thread, int threads) {
    const Record& r = a.records[c.tensor];
    const int slot = c.tensor - a.first_tensor;
    const void* grads = a.grads[slot];
    const bool first = (a.first[slot / 32] >> (slot % 32)) & 1u;
    const TensorScalars<Rule> s = tensor_scalars<Rule, kEmas>(a.options, a.design, a.moment, r, c.tensor, first);
    constexpr bool kNarrow = sizeof(W) == 2 || (kEmas > 0 && sizeof(E) == 2);
    constexpr int kPack = kNarrow ? 8 : 4;  // 16 bytes of the narrowest type
    const bool packs = r.aligned && reinterpret_cast<uintptr_t>(grads) % 16 == 0;
    const int packed = packs ? c.count / kPack * kPack : 0;
    for (int i = thread * kPack; i < packed; i += threads * kPack)
        step_pack<Rule, W, E, kEmas, kPack>(r, grads, a.float_grads, c.begin + i, s);
    for (int i = packed + thread; i < c.count; i += threads)
        step_pack<Rule, W, E, kEmas, 1>(r, grads, a.float_grads, c.begin + i, s);
}

// After every block has read the counts, the last one adds to them.
template <class Rule>
LP_INLINE void count_step(const StepArgs<Rule>& a, int thread, int threads) {
    for (int i = thread; i < a.tensors; i += threads)
        if (float* count = a.records[a.first_tensor + i].count) *count += 1.0f;
    if (thread != 0 || !a.advance_clock) return;
    if (a.moment.clock) *a.moment.clock += 1;
    if (a.moment.horizon_at) *a.moment.horizon_at = static_cast<float>(a.moment.horizon);
}

// Past weights of one tensor, or the update of one tensor's averages; `terms` float or bf16.
struct ReconstructArgs {
    void* out;
    const void* weight;
    const void* term[kMaxTerms];
    float tap[kMaxTerms];
    const float* taps_at;  // instead of `tap`
    int64_t numel;
    int32_t terms, half_terms;  // bit k: term k is bf16
    int32_t float_weight;       // `weight` is a float master of a narrower `out`
    int32_t aligned;
};

template <class W>
struct Reconstruct {
    using Args = ReconstructArgs;

    template <int N>
    LP_INLINE static void pack(const Args& a, int64_t at) {
        float past[N], term[N];
        if (sizeof(W) == 4 || a.float_weight)
            load<float, N>(a.weight, at, past);
        else
            load<W, N>(a.weight, at, past);
        LP_UNROLL for (int k = 0; k < kMaxTerms; ++k) {
            if (k >= a.terms) continue;
            if ((a.half_terms >> k) & 1)
                load<bf16, N>(a.term[k], at, term);
            else
                load<float, N>(a.term[k], at, term);
            const float tap = a.taps_at ? a.taps_at[k] : a.tap[k];
            LP_UNROLL for (int i = 0; i < N; ++i) past[i] = fused_multiply_add(tap, term[i], past[i]);
        }
        store<W, N, false>(a.out, at, past, Nearest{});
    }
};

struct EmaArgs {
    void* ema[kMaxEmas];
    const void* update;
    float decay[kMaxEmas], one_minus_decay[kMaxEmas], turn;
    uint32_t key[kMaxEmas];
    int64_t numel;
    int32_t emas, half_emas;  // bit k: ema k is bf16
    int32_t aligned;
};

template <class U>
struct EmaUpdate {
    using Args = EmaArgs;

    template <int N>
    LP_INLINE static void pack(const Args& a, int64_t at) {
        float update[N], ema[kMaxEmas][N] = {};
        const Turn<float> turn(a.turn);
        load<U, N>(a.update, at, update);
        LP_UNROLL for (int k = 0; k < kMaxEmas; ++k) {
            if (k >= a.emas) continue;
            if ((a.half_emas >> k) & 1)
                load<bf16, N>(a.ema[k], at, ema[k]);
            else
                load<float, N>(a.ema[k], at, ema[k]);
        }
        LP_UNROLL for (int i = 0; i < N; ++i) {
            float averages[kMaxEmas];
            LP_UNROLL for (int k = 0; k < kMaxEmas; ++k) averages[k] = ema[k][i];
            ema_update<float, kMaxEmas>(averages, update[i], a.decay, a.one_minus_decay, turn);
            LP_UNROLL for (int k = 0; k < kMaxEmas; ++k) ema[k][i] = averages[k];
        }
        LP_UNROLL for (int k = 0; k < kMaxEmas; ++k) {
            if (k >= a.emas) continue;
            if ((a.half_emas >> k) & 1)
                store<bf16, N, true>(a.ema[k], at, ema[k], Stochastic{a.key[k]});
            else
                store<float, N, true>(a.ema[k], at, ema[k], Nearest{});
        }
    }
};

// Everything of one tensor that belongs to one thread; a pack is 16 bytes of the narrowest type.
template <class Work>
LP_INLINE void tensor_walk(const typename Work::Args& a, int64_t thread, int64_t threads) {
    constexpr int kPack = 8;
    const int64_t packed = a.aligned ? a.numel / kPack * kPack : 0;
    for (int64_t i = thread * kPack; i < packed; i += threads * kPack) Work::template pack<kPack>(a, i);
    for (int64_t i = packed + thread; i < a.numel; i += threads) Work::template pack<1>(a, i);
}

}  // namespace layerpipe
