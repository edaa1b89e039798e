// A parameter group made ready for its step: built once, run every step, on the CPU or on a GPU.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "group.h"

namespace layerpipe {

// Where a group's arrays lie. Empty lists are arrays that the group does not have.
struct GroupArrays {
    int device;  // CUDA's number, -1 for the CPU
    Dtype weight, grad, average;
    int emas;
    std::vector<int64_t> numels;
    std::vector<uint64_t> weights, masters, counts, averages, pasts, previous;
    std::vector<std::vector<uint64_t>> states;  // per kind of state, in the order of step.h
};

struct Design {
    int64_t delay;
    std::vector<double> decays, taps;
    double tap_update, fill_tap, fill_ratio;
    bool ema_of_gradient;
    uint32_t seed;
    double turn;

    template <class T>
    PastDesign<T> as() const {
        PastDesign<T> d{delay, {}, {}, {}, T(tap_update), T(fill_tap), T(fill_ratio), seed, ema_of_gradient, T(turn)};
        for (size_t k = 0; k < decays.size(); ++k) {
            d.decay[k] = T(decays[k]);
            d.one_minus_decay[k] = T(1.0 - decays[k]);
            d.tap[k] = T(taps[k]);
        }
        return d;
    }
};

// Where work is to be done.
struct Target {
    int device;    // CUDA's number, -1 for the CPU
    void* stream;  // a cudaStream_t; 0 is the default stream
    int threads;   // of the CPU
};

// Does not own memory: the caller keeps the tensors alive and makes a new plan when a pointer changes.
class StepPlan {
   public:
    // `rule` is "sgd", "adam", "adam_direction" or "direction". Throws std::invalid_argument for lists that do not fit
    // together.
    static std::unique_ptr<StepPlan> make(const std::string& rule, GroupArrays arrays, int64_t chunk);
    virtual ~StepPlan() = default;

    // The rule's hyperparameters, in the order of its Options, and what the step keeps of the past.
    virtual void configure(const std::vector<double>& options, const Design& design) = 0;

    // The records, chunks and counter that a GPU reads, and where in its memory the caller has put them.
    virtual std::vector<uint8_t> table() const { return {}; }
    virtual void set_table(uint64_t) {}

    // Updates all tensors; `grads` and `first` (no state yet) have one entry per tensor, `first` may be empty.
    virtual void step(const Moment& moment, const std::vector<uint8_t>& first, const Target& target) = 0;

    std::vector<const void*> grads;

    const GroupArrays& arrays() const { return arrays_; }
    const Record& record(size_t i) const { return records_.at(i); }
    int64_t numel() const { return numel_; }
    size_t chunks() const { return chunks_.size(); }
    int launches() const { return launches_; }

   protected:
    StepPlan(GroupArrays arrays, int64_t chunk);

    GroupArrays arrays_;
    std::vector<Record> records_;
    std::vector<Chunk> chunks_;
    int64_t numel_ = 0;
    int launches_ = 0;
};

void require(bool condition, const std::string& message);

// What plans of a rule have in common.
template <class Rule>
class PlanOf : public StepPlan {
   public:
    using T = typename Rule::Number;

    PlanOf(GroupArrays arrays, int64_t chunk) : StepPlan(std::move(arrays), chunk) {
        const GroupArrays& a = arrays_;
        const int states = static_cast<int>(a.states.size());
        require(Rule::kLeast <= states && states <= Rule::kStates,
                "StepPlan: not as many kinds of state as the rule has");
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
        design_ = d.as<T>();
    }

   protected:
    typename Rule::Options options_{};
    PastDesign<T> design_{};
};

#if defined(LP_CUDA)
// In cuda/plan.cpp.
std::unique_ptr<StepPlan> make_cuda_plan(const std::string& rule, GroupArrays arrays, int64_t chunk);
#endif

}  // namespace layerpipe
