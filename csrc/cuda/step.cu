// The step's kernels for one dtype of weights, LP_WEIGHT, and one rule, LP_RULE; compiled once per pair.
//
// Bytes per float32 parameter, from walk.h: SGD with momentum 20, Adam 28, a given direction 12; each float32 average
// 8 more, the past weights 4, the last update of predicted weights 8. Adam's direction alone 24.
#include "device.cuh"
#include "launch.h"

namespace layerpipe {
namespace {

template <class Rule, class W, class E, int kEmas>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ StepArgs<Rule> args) {
    if (overflowed(args.moment)) return;
    step_chunk<Rule, W, E, kEmas>(args, args.chunks[blockIdx.x], threadIdx.x, blockDim.x);
    if (!args.blocks_done) return;

    // The counts may change once every thread of every block has read them.
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(args.blocks_done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last) count_step(args, threadIdx.x, blockDim.x);
}

template <class Rule, class W, class E, int kEmas>
void launch(const StepArgs<Rule>& args, int64_t chunks, cudaStream_t stream) {
    step_kernel<Rule, W, E, kEmas><<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(args);
}

template <class Rule, class W, class E>
void launch_emas(const StepArgs<Rule>& args, int64_t chunks, int emas, cudaStream_t stream) {
    switch (emas) {
        case 1: return launch<Rule, W, E, 1>(args, chunks, stream);
        case 2: return launch<Rule, W, E, 2>(args, chunks, stream);
        default: return launch<Rule, W, E, 3>(args, chunks, stream);
    }
}

}  // namespace

template <class Rule, class W>
void cuda_step_of(const StepArgs<Rule>& args, int64_t chunks, Dtype average, int emas, CudaTarget target) {
    const OnDevice on(target.device);
    const auto stream = static_cast<cudaStream_t>(target.stream);
    if (emas == 0)
        launch<Rule, W, float, 0>(args, chunks, stream);
    else if constexpr (Rule::kUpdates) {
        if (average == Dtype::bf16)
            launch_emas<Rule, W, bf16>(args, chunks, emas, stream);
        else
            launch_emas<Rule, W, float>(args, chunks, emas, stream);
    }
    check(cudaGetLastError(), "launching the optimizer step");
}

template void cuda_step_of<LP_RULE<float>, LP_WEIGHT>(const StepArgs<LP_RULE<float>>&, int64_t, Dtype, int, CudaTarget);

}  // namespace layerpipe
