// A parameter group's step on a GPU: a table of its arrays in the device's memory, and one launch for every kMaxGrads
// tensors.
#include <algorithm>
#include <stdexcept>

#include "launch.h"

namespace layerpipe {
namespace {

template <class Rule>
StepLaunch<Rule> launch_of(const GroupArrays& a) {
    const int states = static_cast<int>(a.states.size());
    if constexpr (Rule::kUpdates) {
        if (a.weight == Dtype::bf16) return step_launch<Rule, bf16>(a.average, states, a.emas);
        if (a.weight == Dtype::f16) return step_launch<Rule, f16>(a.average, states, a.emas);
    }
    require(a.weight == Dtype::f32, "StepPlan: the CUDA step takes float32, bfloat16 and float16");
    return step_launch<Rule, float>(a.average, states, a.emas);
}

template <class Rule>
class CudaPlan final : public PlanOf<Rule> {
   public:
    CudaPlan(GroupArrays arrays, int64_t chunk)
        : PlanOf<Rule>(std::move(arrays), chunk ? chunk : kGpuChunk), launch_(launch_of<Rule>(this->arrays_)) {
        static_assert(sizeof(StepArgs<Rule>) <= 4096, "a kernel's arguments");
        const int tensors = static_cast<int>(this->records_.size());
        this->launches_ = (tensors + kMaxGrads - 1) / kMaxGrads;
        // Chunks are in the order of their tensors: those of one launch are neighbours.
        begin_.assign(this->launches_ + 1, static_cast<int64_t>(this->chunks_.size()));
        for (size_t i = this->chunks_.size(); i-- > 0;) begin_[this->chunks_[i].tensor / kMaxGrads] = i;
    }

    std::vector<uint8_t> table() const override {
        std::vector<uint8_t> bytes(counter_at() + 16, 0);
        std::copy_n(reinterpret_cast<const uint8_t*>(this->records_.data()), chunks_at(), bytes.data());
        std::copy_n(reinterpret_cast<const uint8_t*>(this->chunks_.data()), counter_at() - chunks_at(),
                    bytes.data() + chunks_at());
        return bytes;
    }

    void set_table(uint64_t base) override { base_ = base; }

    void step(const Moment& moment, const std::vector<uint8_t>& first, const Target& target) override {
        require(base_ != 0 || this->chunks_.empty(), "step: the table has not been uploaded");
        const GroupArrays& a = this->arrays_;
        StepArgs<Rule> args{};
        args.options = this->options_;
        args.design = this->design_;
        args.moment = moment;
        args.records = reinterpret_cast<const Record*>(base_);
        args.float_grads = a.grad != a.weight;
        const bool counts = !a.counts.empty() || moment.clock || moment.horizon_at;
        args.blocks_done = counts ? reinterpret_cast<uint32_t*>(base_ + counter_at()) : nullptr;
        for (int l = 0; l < this->launches_; ++l) {
            args.first_tensor = l * kMaxGrads;
            args.tensors = std::min(kMaxGrads, static_cast<int>(this->records_.size()) - args.first_tensor);
            args.chunks = reinterpret_cast<const Chunk*>(base_ + chunks_at()) + begin_[l];
            args.advance_clock = l + 1 == this->launches_;
            std::fill(std::begin(args.first), std::end(args.first), 0u);
            for (int i = 0; i < args.tensors; ++i) {
                args.grads[i] = this->grads[args.first_tensor + i];
                if (!first.empty() && first[args.first_tensor + i]) args.first[i / 32] |= 1u << (i % 32);
            }
            launch_(args, static_cast<unsigned>(begin_[l + 1] - begin_[l]), target);
        }
    }

   private:
    size_t chunks_at() const { return this->records_.size() * sizeof(Record); }
    size_t counter_at() const { return chunks_at() + this->chunks_.size() * sizeof(Chunk); }

    StepLaunch<Rule> launch_;
    std::vector<int64_t> begin_;
    uint64_t base_ = 0;
};

}  // namespace

std::unique_ptr<StepPlan> make_cuda_plan(const std::string& rule, GroupArrays arrays, int64_t chunk) {
    if (rule == "sgd") return std::make_unique<CudaPlan<Sgd<float>>>(std::move(arrays), chunk);
    if (rule == "adam") return std::make_unique<CudaPlan<Adam<float>>>(std::move(arrays), chunk);
    if (rule == "adam_direction") return std::make_unique<CudaPlan<AdamDirection<float>>>(std::move(arrays), chunk);
    if (rule == "direction") return std::make_unique<CudaPlan<Direction<float>>>(std::move(arrays), chunk);
    throw std::invalid_argument("StepPlan: unknown rule " + rule);
}

}  // namespace layerpipe
