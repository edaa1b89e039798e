// The kernels of one tensor: past weights, and the update of averages.
//
// Bytes per element: past weights 8 and 4 per term, all float32 (at an H200's 4.8 TB/s 0.60e12 elements/s without
// terms, 0.40e12 with one); averages 4 and 8 per average. A thread reads 4 elements of every array at a time, 8 to 80
// bytes; 3 blocks of 256, which may use 80 registers each, have 24 KB under way with 2 float32 arrays and 36 KB with 3
// (step.cu).
#include <algorithm>

#include "device.cuh"
#include "launch.h"

namespace layerpipe {
namespace {

constexpr int kBlocksPerMultiprocessor = 3;

template <class Walk>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    tensor_kernel(const __grid_constant__ typename Walk::Args args) {
    Walk::run(args, blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x,
              static_cast<int64_t>(gridDim.x) * blockDim.x);
}

template <class Walk>
void launch(const typename Walk::Args& args, const Target& target) {
    if (!args.numel) return;
    const OnDevice on(target.device);
    const int64_t blocks = std::min<int64_t>((args.numel + kGpuChunk - 1) / kGpuChunk * 4, 1 << 20);
    tensor_kernel<Walk><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(target.stream)>>>(args);
    check(cudaGetLastError(), "launching a kernel of one tensor");
}

// Calls `f` with a value of the type that `dtype` names.
template <class F>
void with_dtype(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::f32: return f(float());
        case Dtype::bf16: return f(bf16());
        case Dtype::f16: return f(f16());
        default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
    }
}

}  // namespace

void cuda_reconstruct(const Reconstruction& work, const Target& target) {
    with_dtype(work.out.dtype, [&](auto out) {
        with_constant<0, kMaxTerms>(work.terms,
                                    [&](auto terms) { launch<ReconstructWalk<decltype(out), terms>>(work, target); });
    });
}

void cuda_average(const Averages& work, const Target& target) {
    if (!work.emas) return;
    with_dtype(work.update.dtype, [&](auto update) {
        with_constant<1, kMaxEmas>(work.emas,
                                   [&](auto emas) { launch<AverageWalk<decltype(update), emas>>(work, target); });
    });
}

}  // namespace layerpipe
