// What the rest of the module knows of CUDA. All throw std::runtime_error with CUDA's words.
#pragma once

#include "../plan.h"
#include "../walk.h"

namespace layerpipe {

// A step's kernel as compiled for what a group keeps: one launch of `blocks` blocks, a chunk each.
template <class Rule>
using StepLaunch = void (*)(const StepArgs<Rule>& args, unsigned blocks, const Target& target);

// W: the type of the weights.
template <class Rule, class W>
StepLaunch<Rule> step_launch(Dtype average, int states, int emas);

void cuda_reconstruct(const Reconstruction& work, const Target& target);
void cuda_average(const Averages& work, const Target& target);

}  // namespace layerpipe
