// The step's kernels for one dtype of weights, LP_WEIGHT, and one rule, LP_RULE; compiled once per pair.
//
// Bytes per parameter, and the roofline: parameters per second (1e12) at the 4.8 TB/s of an H200's data sheet.
//
//                                        float32      bfloat16, float32 state
//   SGD with momentum                    20  0.24     14  0.34
//   Adam                                 28  0.17     22  0.22
//   a given direction                    12  0.40      6  0.80
//   Adam's direction alone               24  0.20      -
//   + each float32 average, or the last update where weights are predicted: 8; a bfloat16 average: 4
//   + past weights                        4            2
//
// Launch bounds: to fill memory whose reads take about 0.8 us, each of 132 multiprocessors must have 4.8 TB/s * 0.8 us
// / 132 = 29 KB of them under way. A thread reads 4 elements of every array at a time. 4 blocks of 256 threads, which
// may use 64 registers each, have 48 KB under way with 3 float32 arrays (32 KB where weights and gradients have 16
// bits); with more than 4 arrays, for whose addresses and values 64 registers are too few, 2 blocks have at least 36
// KB.
#include "device.cuh"
#include "launch.h"

namespace layerpipe {
namespace {

// Blocks per multiprocessor by a group's arrays of weights, gradients, states and averages.
#if defined(LP_BLOCKS)  // to be compared: bench/gpu.sh
constexpr int blocks_per_multiprocessor(int) { return LP_BLOCKS; }
#else
constexpr int blocks_per_multiprocessor(int arrays) { return arrays <= 4 ? 4 : 2; }
#endif

// Adds 1 to the finished blocks, and says whether this one is the last. What the block's threads have read before the
// barrier counts as read before the addition: released by each block, acquired by the last.
__device__ __forceinline__ bool is_last(uint32_t* blocks_done) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(blocks_done)), "r"(gridDim.x - 1)
                 : "memory");
    return before == gridDim.x - 1;
}

template <class Walk>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(Walk::Pass::kSlots - 2))
    step_kernel(const __grid_constant__ typename Walk::Args args) {
    if (overflowed(args.moment)) return;
    Walk::chunk(args, args.chunks[blockIdx.x], threadIdx.x, blockDim.x);
    if (!args.blocks_done) return;

    // The counts may change once every thread of every block has read them.
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = is_last(args.blocks_done);
    __syncthreads();
    if (last) Walk::count(args, threadIdx.x, blockDim.x);
}

template <class Walk>
void launch(const typename Walk::Args& args, unsigned blocks, const Target& target) {
    const OnDevice on(target.device);
    step_kernel<Walk><<<blocks, kThreads, 0, static_cast<cudaStream_t>(target.stream)>>>(args);
    check(cudaGetLastError(), "launching the optimizer step");
}

}  // namespace

template <class Rule, class W>
StepLaunch<Rule> step_launch(Dtype average, int states, int emas) {
    return with_constant<Rule::kLeast, Rule::kStates>(states, [&](auto kept) -> StepLaunch<Rule> {
        return with_constant<0, Rule::kUpdates * kMaxEmas>(emas, [&](auto k) -> StepLaunch<Rule> {
            if constexpr (k > 0)
                if (average == Dtype::bf16) return launch<StepWalk<Rule, W, bf16, kept, k>>;
            return launch<StepWalk<Rule, W, float, kept, k>>;
        });
    });
}

template StepLaunch<LP_RULE<float>> step_launch<LP_RULE<float>, LP_WEIGHT>(Dtype, int, int);

}  // namespace layerpipe
