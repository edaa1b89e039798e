// What one thread of a GPU does: its share of an array, in packs of 4 elements. Compiled for the host as well, where
// tests run it in a loop over blocks and threads.
#pragma once

#include <type_traits>
#include <utility>

#include "chunks.h"
#include "pass.h"

namespace layerpipe {

constexpr int kThreads = 256;
constexpr int64_t kGpuChunk = 1 << 13;
constexpr int kMaxGrads = 400;  // what fits into a kernel's 4 KB of arguments, everything else included
// A pack is one access to each array: 16 bytes of float, 8 of a 16-bit type. The threads of a warp together then read
// and write without gaps whatever types stand beside each other; packs of 8 would leave every second 16 bytes of a
// float array to another instruction, which writes half sectors.
constexpr int kPack = 4;

struct alignas(16) Bytes16 {
    uint32_t word[4];
};
struct alignas(8) Bytes8 {
    uint32_t word[2];
};

// N elements of S: one access.
template <class S, int N>
using Word = std::conditional_t<
    N * sizeof(S) == 16, Bytes16,
    std::conditional_t<N * sizeof(S) == 8, Bytes8, std::conditional_t<N * sizeof(S) == 4, uint32_t, uint16_t>>>;

// The intrinsics also tell the compiler what it cannot know of a pointer that was itself loaded: that it points to
// global memory. Everything is read once per pass, so loads are streamed.
template <class Word>
LP_INLINE Word read(const Word* p) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Word) == 16) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
        return {{v.x, v.y, v.z, v.w}};
    } else if constexpr (sizeof(Word) == 8) {
        const uint2 v = __ldcs(reinterpret_cast<const uint2*>(p));
        return {{v.x, v.y}};
    } else {
        return __ldcs(p);
    }
#else
    return *p;
#endif
}

// Weights and past weights are what the next forward and backward read; everything else is not touched before the next
// step, and leaves with a streaming hint.
template <bool kStreaming, class Word>
LP_INLINE void write(Word* p, Word v) {
#if defined(__CUDA_ARCH__)
    if constexpr (!kStreaming) {
        __builtin_assume(__isGlobal(p));
        *p = v;
    } else if constexpr (sizeof(Word) == 16) {
        __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
    } else if constexpr (sizeof(Word) == 8) {
        __stcs(reinterpret_cast<uint2*>(p), make_uint2(v.word[0], v.word[1]));
    } else {
        __stcs(p, v);
    }
#else
    *p = v;
#endif
}

// No load moves behind this point: all of a pack's are under way before the first of them is waited for.
LP_INLINE void all_loads_issued() {
#if defined(__CUDA_ARCH__)
    asm volatile("" ::: "memory");
#endif
}

// One array of a pass, S in memory. Several may share a slot where only the launch or the tensor tells which of them is
// read: a weight and its master, gradients of either type.
template <class S, int kSlot, bool kStreaming = false, bool kStochastic = false>
struct Column {
    void* base;
    bool reads, writes;
    uint32_t key = 0;  // of the random bits; with seed, update, tensor, average and element they are always the same

    template <int N>
    LP_INLINE Word<S, N>* at(int64_t i) const {
        return reinterpret_cast<Word<S, N>*>(static_cast<S*>(base) + i);
    }
    template <int N>
    LP_INLINE bool aligned() const {
        return reinterpret_cast<uintptr_t>(base) % sizeof(Word<S, N>) == 0 || !(reads || writes);
    }
    template <int N>
    LP_INLINE void fetch(Bytes16& raw, int64_t i) const {
        if (!reads) return;
        const auto word = read(at<N>(i));
        memcpy(&raw, &word, sizeof(word));
    }
    template <int N, int kSlots>
    LP_INLINE void widen(const Bytes16& raw, float (&x)[N][kSlots]) const {
        if (!reads) return;
        S values[N];
        memcpy(values, &raw, sizeof(values));
        LP_UNROLL for (int n = 0; n < N; ++n) x[n][kSlot] = to_compute(values[n]);
    }
    template <int N, int kSlots>
    LP_INLINE void store(const float (&x)[N][kSlots], int64_t i) const {
        if (!writes) return;
        S values[N];
        LP_UNROLL for (int n = 0; n < N; ++n) {
            if constexpr (kStochastic)
                values[n] = round_stochastic(x[n][kSlot], hash32(key ^ static_cast<uint32_t>(i + n)));
            else
                values[n] = round_to<S, float>(x[n][kSlot]);
        }
        Word<S, N> word;
        memcpy(&word, values, sizeof(word));
        write<kStreaming>(at<N>(i), word);
    }
};

// An average: float, or bf16 rounded at random.
template <class E, int kSlot>
using AverageColumn = Column<E, kSlot, true, sizeof(E) == 2>;

template <int N, class Pass, class... Columns>
LP_INLINE void walk_pack(const Pass& pass, int64_t at, const Columns&... column) {
    Bytes16 raw[sizeof...(Columns)];
    float x[N][Pass::kSlots] = {};
    int loaded = 0, widened = 0;
    (column.template fetch<N>(raw[loaded++], at), ...);
    all_loads_issued();
    (column.widen(raw[widened++], x), ...);
    LP_UNROLL for (int n = 0; n < N; ++n) pass(x[n]);
    (column.store(x, at), ...);
}

// Everything from `begin` on that belongs to one thread. No round begins before the one before it has ended: it would
// take registers that other warps hide their memory's latency with.
template <class Pass, class Index, class... Columns>
LP_INLINE void walk(const Pass& pass, int64_t begin, Index count, Index thread, Index threads,
                    const Columns... column) {
    const Index packed = (column.template aligned<kPack>() && ...) ? count / kPack * kPack : 0;
    LP_NO_UNROLL for (Index i = thread * kPack; i < packed; i += threads * kPack)
        walk_pack<kPack>(pass, begin + i, column...);
    LP_NO_UNROLL for (Index i = packed + thread; i < count; i += threads) walk_pack<1>(pass, begin + i, column...);
}

// The step kernel's argument.
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

// A step's kernel by what is known when it is compiled. W: weights, E: averages.
template <class Rule_, class W, class E, int kKept, int kEmas>
struct StepWalk {
    using Rule = Rule_;
    using Args = StepArgs<Rule>;
    using Pass = Step<Rule, kKept, kEmas, Rule::kUpdates, Rule::kUpdates>;

    // Everything of one chunk that belongs to one thread. The chunk and the record are copies: stores could otherwise
    // change them, as far as the compiler knows.
    LP_INLINE static void chunk(const Args& a, const Chunk c, int thread, int threads) {
        columns(a, c, thread, threads, std::make_integer_sequence<int, kKept>(),
                std::make_integer_sequence<int, kEmas>());
    }

    // After every block has read the counts, the last one adds to them.
    LP_INLINE static void count(const Args& a, int thread, int threads) {
        for (int i = thread; i < a.tensors; i += threads)
            if (float* count = a.records[a.first_tensor + i].count) *count += 1.0f;
        if (thread != 0 || !a.advance_clock) return;
        if (a.moment.clock) *a.moment.clock += 1;
        if (a.moment.horizon_at) *a.moment.horizon_at = static_cast<float>(a.moment.horizon);
    }

   private:
    template <int... J, int... K>
    LP_INLINE static void columns(const Args& a, const Chunk& c, int thread, int threads,
                                  std::integer_sequence<int, J...>, std::integer_sequence<int, K...>) {
        const Record r = a.records[c.tensor];
        const int slot = c.tensor - a.first_tensor;
        void* const grads = const_cast<void*>(a.grads[slot]);
        const bool first = (a.first[slot / 32] >> (slot % 32)) & 1u;
        const Pass pass{tensor_scalars<Rule>(a.options, a.design, kEmas, a.moment, r, c.tensor, first)};
        const bool master = sizeof(W) == 2 && r.master, wide = sizeof(W) == 2 && a.float_grads;
        const bool predicted = Rule::kUpdates && r.previous, past = Rule::kUpdates && r.past;
        walk(pass, c.begin, c.count, thread, threads,                              //
             Column<W, Pass::kWeight>{r.weight, Rule::kUpdates && !master, true},  //
             Column<float, Pass::kWeight, true>{r.master, master, master},         //
             Column<W, Pass::kGrad>{grads, !wide, false},                          //
             Column<float, Pass::kGrad>{grads, wide, false},                       //
             Column<float, Pass::kState + J, true>{r.state[J], true, true}...,     //
             Column<float, Pass::kPrevious, true>{r.previous, predicted, predicted},
             AverageColumn<E, Pass::kEma + K>{static_cast<E*>(r.ema) + K * r.numel, true, true, pass.s.key[K]}...,
             Column<W, Pass::kPast>{r.past, false, past});
    }
};

// W: the past weights.
template <class W, int kTerms>
struct ReconstructWalk {
    using Args = Reconstruction;
    using Pass = Reconstruct<float, kTerms>;

    LP_INLINE static void run(const Args& a, int64_t thread, int64_t threads) {
        columns(a, thread, threads, std::make_integer_sequence<int, kTerms>());
    }

   private:
    template <int... K>
    LP_INLINE static void columns(const Args& a, int64_t thread, int64_t threads, std::integer_sequence<int, K...>) {
        const bool wide = sizeof(W) == 2 && a.weight.dtype == Dtype::f32;
        walk(Pass(a), 0, a.numel, thread, threads,                      //
             Column<W, Pass::kOut>{a.out.base, false, true},            //
             Column<W, Pass::kWeight>{a.weight.base, !wide, false},     //
             Column<float, Pass::kWeight>{a.weight.base, wide, false},  //
             Column<float, Pass::kTerm + K>{a.term[K].base, a.term[K].dtype == Dtype::f32, false}...,
             Column<bf16, Pass::kTerm + K>{a.term[K].base, a.term[K].dtype == Dtype::bf16, false}...);
    }
};

// U: the update.
template <class U, int kEmas>
struct AverageWalk {
    using Args = Averages;
    using Pass = Average<float, kEmas>;

    LP_INLINE static void run(const Args& a, int64_t thread, int64_t threads) {
        columns(a, thread, threads, std::make_integer_sequence<int, kEmas>());
    }

   private:
    template <int... K>
    LP_INLINE static void columns(const Args& a, int64_t thread, int64_t threads, std::integer_sequence<int, K...>) {
        const auto is = [&a](int k, Dtype dtype) { return a.ema[k].dtype == dtype; };
        walk(Pass(a), 0, a.numel, thread, threads, Column<U, Pass::kUpdate>{a.update.base, true, false},
             AverageColumn<float, Pass::kEma + K>{a.ema[K].base, is(K, Dtype::f32), is(K, Dtype::f32)}...,
             AverageColumn<bf16, Pass::kEma + K>{a.ema[K].base, is(K, Dtype::bf16), is(K, Dtype::bf16), a.key[K]}...);
    }
};

}  // namespace layerpipe
