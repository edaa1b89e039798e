#include "plan.h"

#include <stdexcept>

#include "cpu/launch.h"

namespace layerpipe {

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

namespace {

template <class P>
P pointer(const std::vector<uint64_t>& list, size_t i) {
    return list.empty() ? nullptr : reinterpret_cast<P>(list[i]);
}

}  // namespace

StepPlan::StepPlan(GroupArrays arrays, int64_t chunk) : arrays_(std::move(arrays)) {
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
        records_.push_back(r);
    }
    chunks_ = make_chunks(a.numels, chunk);
    grads.resize(n);
}

namespace {

template <class Rule>
class CpuPlan final : public PlanOf<Rule> {
   public:
    using PlanOf<Rule>::PlanOf;

    void step(const Moment& moment, const std::vector<uint8_t>& first, const Target& target) override {
        if (overflowed(moment)) return;
        const GroupArrays& a = this->arrays_;
        scalars_.resize(this->records_.size());
        for (size_t i = 0; i < scalars_.size(); ++i)
            scalars_[i] = tensor_scalars<Rule>(this->options_, this->design_, a.emas, moment, this->records_[i],
                                               static_cast<int>(i), !first.empty() && first[i]);
        const Layout layout{a.weight, a.grad, a.average, static_cast<int>(a.states.size()), a.emas};
        const auto run = instruction_set().step<Rule>();
        parallel_chunks(this->chunks_.size(), this->numel_, target.threads, [&](size_t i) {
            const Chunk& c = this->chunks_[i];
            run(this->records_[c.tensor], this->grads[c.tensor], layout, scalars_[c.tensor], c.begin,
                c.begin + c.count);
        });
        for (const Record& r : this->records_)
            if (r.count) *r.count += 1.0f;
        if (moment.clock) *moment.clock += 1;
        if (moment.horizon_at) *moment.horizon_at = static_cast<float>(moment.horizon);
    }

   private:
    std::vector<TensorScalars<Rule>> scalars_;
};

template <template <class> class Rule>
std::unique_ptr<StepPlan> make_plan(GroupArrays arrays, int64_t chunk) {
    if (!chunk) chunk = kCpuChunk;
    if (arrays.weight == Dtype::f64) return std::make_unique<CpuPlan<Rule<double>>>(std::move(arrays), chunk);
    return std::make_unique<CpuPlan<Rule<float>>>(std::move(arrays), chunk);
}

}  // namespace

std::unique_ptr<StepPlan> StepPlan::make(const std::string& rule, GroupArrays arrays, int64_t chunk) {
    if (arrays.device >= 0) {
#if defined(LP_CUDA)
        return make_cuda_plan(rule, std::move(arrays), chunk);
#else
        throw std::invalid_argument("StepPlan: built without CUDA");
#endif
    }
    if (rule == "sgd") return make_plan<Sgd>(std::move(arrays), chunk);
    if (rule == "adam") return make_plan<Adam>(std::move(arrays), chunk);
    if (rule == "adam_direction") return make_plan<AdamDirection>(std::move(arrays), chunk);
    if (rule == "direction") return make_plan<Direction>(std::move(arrays), chunk);
    throw std::invalid_argument("StepPlan: unknown rule " + rule);
}

}  // namespace layerpipe
