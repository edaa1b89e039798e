#include "plan.h"

#include <cstring>
#include <stdexcept>

#include "cpu/launch.h"
#if defined(LP_CUDA)
#include "cuda/launch.h"
#endif

namespace layerpipe {

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

namespace {

template <class P>
P pointer(const std::vector<uint64_t>& list, size_t i) {
    return list.empty() ? nullptr : reinterpret_cast<P>(list[i]);
}

bool all_aligned(const Record& r, const GroupArrays& a) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(r.weight) | reinterpret_cast<uintptr_t>(r.master) |
                     reinterpret_cast<uintptr_t>(r.ema) | reinterpret_cast<uintptr_t>(r.past) |
                     reinterpret_cast<uintptr_t>(r.previous);
    for (const void* state : r.state) bits |= reinterpret_cast<uintptr_t>(state);
    if (a.emas > 1) bits |= static_cast<uintptr_t>(r.numel) * size_of(a.average);
    return bits % 16 == 0;
}

}  // namespace

StepPlan::StepPlan(GroupArrays arrays, int states, int64_t chunk) : arrays_(std::move(arrays)) {
    const GroupArrays& a = arrays_;
    const size_t n = a.numels.size();
    const auto fits = [n](const std::vector<uint64_t>& list, const char* name) {
        require(list.empty() || list.size() == n, std::string("StepPlan: one of `") + name + "` per tensor, or none");
    };
    require(a.weights.size() == n, "StepPlan: one of `weights` per tensor");
    fits(a.masters, "masters");
    fits(a.counts, "counts");
    fits(a.averages, "averages");
    fits(a.pasts, "pasts");
    fits(a.previous, "previous");
    for (const auto& state : a.states) fits(state, "states");
    require(a.emas >= 0 && a.emas <= kMaxEmas, "StepPlan: 0 to 3 EMAs");
    require(a.averages.empty() == (a.emas == 0), "StepPlan: averages where there are EMAs, and only there");
    require(a.states.size() <= static_cast<size_t>(states), "StepPlan: more kinds of state than the rule has");
    require(chunk > 0 && chunk % 64 == 0 && chunk <= (1 << 30), "StepPlan: chunks are multiples of 64 elements");
    const bool wide = a.weight == Dtype::f32 || a.weight == Dtype::f64;
    require(a.grad == a.weight || (!wide && a.grad == Dtype::f32),
            "StepPlan: gradients have the weights' dtype, or float32 where those are narrower");
    require(!wide || a.masters.empty(), "StepPlan: master weights are for weights of 16 bits");
    require(a.average == (a.weight == Dtype::f64 ? Dtype::f64 : Dtype::f32) ||
                (a.average == Dtype::bf16 && a.weight != Dtype::f64),
            "StepPlan: averages are float32 or bfloat16 (float64 with float64 weights)");
    for (size_t i = 0; i < n; ++i) {
        require(a.numels[i] >= 0, "StepPlan: negative size");
        numel_ += a.numels[i];
        Record r{};
        r.weight = pointer<void*>(a.weights, i);
        r.master = pointer<void*>(a.masters, i);
        for (size_t j = 0; j < a.states.size(); ++j) r.state[j] = pointer<void*>(a.states[j], i);
        r.ema = pointer<void*>(a.averages, i);
        r.past = pointer<void*>(a.pasts, i);
        r.previous = pointer<void*>(a.previous, i);
        r.count = pointer<float*>(a.counts, i);
        r.numel = a.numels[i];
        r.aligned = all_aligned(r, a);
        records_.push_back(r);
    }
    chunks_ = make_chunks(a.numels, chunk);
    grads.resize(n);
}

namespace {

template <class Rule>
class PlanOf : public StepPlan {
   public:
    using T = typename Rule::Number;

    PlanOf(GroupArrays arrays, int64_t chunk) : StepPlan(std::move(arrays), Rule::kStates, chunk) {
        const GroupArrays& a = arrays_;
        require(Rule::kUpdates || (a.averages.empty() && a.pasts.empty() && a.previous.empty() && a.masters.empty() &&
                                   (a.weight == Dtype::f32 || a.weight == Dtype::f64)),
                "StepPlan: a rule that only makes directions writes them in full precision, and nothing else");
    }

    void configure(const std::vector<double>& options, const Design& d) override {
        require(options.size() == Rule::kOptions, "configure: not the rule's number of options");
        require(d.decays.size() == static_cast<size_t>(arrays_.emas), "configure: one decay per EMA");
        require(d.taps.size() == static_cast<size_t>(arrays_.emas), "configure: one tap per EMA");
        require(d.turn == 0.0 || arrays_.emas > 1, "configure: two averages turn, not fewer");
        options_ = Rule::options(options.data());
        design_ = {};
        design_.delay = d.delay;
        design_.tap_update = static_cast<T>(d.tap_update);
        design_.fill_tap = static_cast<T>(d.fill_tap);
        design_.fill_ratio = static_cast<T>(d.fill_ratio);
        design_.ema_of_gradient = d.ema_of_gradient;
        design_.seed = d.seed;
        design_.turn = static_cast<T>(d.turn);
        for (int k = 0; k < arrays_.emas; ++k) {
            design_.decay[k] = static_cast<T>(d.decays[k]);
            design_.one_minus_decay[k] = static_cast<T>(1.0 - d.decays[k]);
            design_.tap[k] = static_cast<T>(d.taps[k]);
        }
    }

    std::vector<uint8_t> table() const override { return {}; }
    void set_table(uint64_t) override {}

   protected:
    typename Rule::Options options_{};
    PastDesign<T> design_{};
};

template <class Rule>
TensorScalars<Rule> scalars_of(const typename Rule::Options& options, const PastDesign<typename Rule::Number>& design,
                               const Moment& m, const Record& r, int tensor, bool first, int emas) {
    switch (emas) {
        case 0: return tensor_scalars<Rule, 0>(options, design, m, r, tensor, first);
        case 1: return tensor_scalars<Rule, 1>(options, design, m, r, tensor, first);
        case 2: return tensor_scalars<Rule, 2>(options, design, m, r, tensor, first);
        default: return tensor_scalars<Rule, 3>(options, design, m, r, tensor, first);
    }
}

template <class Rule>
class CpuPlan final : public PlanOf<Rule> {
   public:
    using PlanOf<Rule>::PlanOf;

    void step(const Moment& moment, const std::vector<uint8_t>& first, void*, int threads) override {
        if (overflowed(moment)) return;
        const GroupArrays& a = this->arrays_;
        scalars_.resize(this->records_.size());
        for (size_t i = 0; i < scalars_.size(); ++i)
            scalars_[i] = scalars_of<Rule>(this->options_, this->design_, moment, this->records_[i],
                                           static_cast<int>(i), !first.empty() && first[i], a.emas);
        const Layout layout{a.weight, a.grad, a.average, a.emas};
        cpu_step<Rule>({this->records_, this->chunks_, this->grads, scalars_, layout, this->numel_}, threads);
        for (const Record& r : this->records_)
            if (r.count) *r.count += 1.0f;
        if (moment.clock) *moment.clock += 1;
        if (moment.horizon_at) *moment.horizon_at = static_cast<float>(moment.horizon);
    }

   private:
    std::vector<TensorScalars<Rule>> scalars_;
};

#if defined(LP_CUDA)
template <class Rule>
class CudaPlan final : public PlanOf<Rule> {
   public:
    CudaPlan(GroupArrays arrays, int64_t chunk) : PlanOf<Rule>(std::move(arrays), chunk) {
        static_assert(sizeof(StepArgs<Rule>) <= 4096, "a kernel's arguments");
        const int tensors = static_cast<int>(this->records_.size());
        this->launches_ = (tensors + kMaxGrads - 1) / kMaxGrads;
        // Chunks are in the order of their tensors: those of one launch are neighbours.
        begin_.assign(this->launches_ + 1, static_cast<int64_t>(this->chunks_.size()));
        for (size_t i = this->chunks_.size(); i-- > 0;) begin_[this->chunks_[i].tensor / kMaxGrads] = i;
        for (int l = this->launches_; l-- > 0;) begin_[l] = std::min(begin_[l], begin_[l + 1]);
    }

    std::vector<uint8_t> table() const override {
        std::vector<uint8_t> bytes(counter_at() + 16, 0);
        if (!this->records_.empty()) memcpy(bytes.data(), this->records_.data(), chunks_at());
        if (!this->chunks_.empty())
            memcpy(bytes.data() + chunks_at(), this->chunks_.data(), this->chunks_.size() * sizeof(Chunk));
        return bytes;
    }

    void set_table(uint64_t base) override { base_ = base; }

    void step(const Moment& moment, const std::vector<uint8_t>& first, void* stream, int) override {
        require(base_ != 0 || this->chunks_.empty(), "step: the table has not been uploaded");
        const GroupArrays& a = this->arrays_;
        const int tensors = static_cast<int>(this->records_.size());
        StepArgs<Rule> args{};
        args.options = this->options_;
        args.design = this->design_;
        args.moment = moment;
        args.records = reinterpret_cast<const Record*>(base_);
        args.float_grads = a.grad != a.weight;
        const bool counts = !a.counts.empty() || moment.clock || moment.horizon_at;
        args.blocks_done = counts ? reinterpret_cast<uint32_t*>(base_ + counter_at()) : nullptr;
        for (int l = 0; l < this->launches_; ++l) {
            const int64_t chunks = begin_[l + 1] - begin_[l];
            args.first_tensor = l * kMaxGrads;
            args.tensors = std::min(kMaxGrads, tensors - args.first_tensor);
            args.chunks = reinterpret_cast<const Chunk*>(base_ + chunks_at()) + begin_[l];
            args.advance_clock = begin_[l + 1] == static_cast<int64_t>(this->chunks_.size());
            std::fill(std::begin(args.first), std::end(args.first), 0u);
            for (int i = 0; i < args.tensors; ++i) {
                args.grads[i] = this->grads[args.first_tensor + i];
                if (!first.empty() && first[args.first_tensor + i]) args.first[i / 32] |= 1u << (i % 32);
            }
            cuda_step<Rule>(args, chunks, a.weight, a.average, a.emas, {a.device, stream});
            if (args.advance_clock) break;
        }
    }

   private:
    size_t chunks_at() const { return this->records_.size() * sizeof(Record); }
    size_t counter_at() const { return chunks_at() + this->chunks_.size() * sizeof(Chunk); }

    std::vector<int64_t> begin_;
    uint64_t base_ = 0;
};
#endif

template <template <class> class Rule>
std::unique_ptr<StepPlan> make_plan(GroupArrays arrays, int64_t chunk) {
    if (arrays.device < 0) {
        if (!chunk) chunk = kCpuChunk;
        if (arrays.weight == Dtype::f64) return std::make_unique<CpuPlan<Rule<double>>>(std::move(arrays), chunk);
        return std::make_unique<CpuPlan<Rule<float>>>(std::move(arrays), chunk);
    }
#if defined(LP_CUDA)
    require(arrays.weight != Dtype::f64, "StepPlan: no CUDA step for float64");
    if (!chunk) chunk = kGpuChunk;
    return std::make_unique<CudaPlan<Rule<float>>>(std::move(arrays), chunk);
#else
    throw std::invalid_argument("StepPlan: built without CUDA");
#endif
}

}  // namespace

std::unique_ptr<StepPlan> StepPlan::make(const std::string& rule, GroupArrays arrays, int64_t chunk) {
    if (rule == "sgd") return make_plan<Sgd>(std::move(arrays), chunk);
    if (rule == "adam") return make_plan<Adam>(std::move(arrays), chunk);
    if (rule == "adam_direction") return make_plan<AdamDirection>(std::move(arrays), chunk);
    if (rule == "direction") return make_plan<Direction>(std::move(arrays), chunk);
    throw std::invalid_argument("StepPlan: unknown rule " + rule);
}

}  // namespace layerpipe
