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
    virtual std::vector<uint8_t> table() const = 0;
    virtual void set_table(uint64_t) = 0;

    // Updates all tensors; `grads` and `first` (no state yet) have one entry per tensor, `first` may be empty.
    // `stream` is a cudaStream_t, `threads` is for the CPU.
    virtual void step(const Moment& moment, const std::vector<uint8_t>& first, void* stream, int threads) = 0;

    std::vector<const void*> grads;

    const GroupArrays& arrays() const { return arrays_; }
    const Record& record(size_t i) const { return records_.at(i); }
    int64_t numel() const { return numel_; }
    size_t chunks() const { return chunks_.size(); }
    int launches() const { return launches_; }

   protected:
    StepPlan(GroupArrays arrays, int states, int64_t chunk);

    GroupArrays arrays_;
    std::vector<Record> records_;
    std::vector<Chunk> chunks_;
    int64_t numel_ = 0;
    int launches_ = 0;
};

void require(bool condition, const std::string& message);

}  // namespace layerpipe
