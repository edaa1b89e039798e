// What the rest of the module knows of CUDA.
#pragma once

#include <cstdint>

#include "../walk.h"

namespace layerpipe {

struct CudaTarget {
    int device;
    void* stream;  // cudaStream_t; 0 is the default stream
};

// One launch of `chunks` blocks; weights and averages of the dtypes given. Throws std::runtime_error with CUDA's words.
template <class Rule>
void cuda_step(const StepArgs<Rule>& args, int64_t chunks, Dtype weight, Dtype average, int emas, CudaTarget target);
void cuda_reconstruct(const ReconstructArgs& args, Dtype out, CudaTarget target);
void cuda_ema_update(const EmaArgs& args, Dtype update, CudaTarget target);

}  // namespace layerpipe
