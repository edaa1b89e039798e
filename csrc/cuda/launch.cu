// One tensor's kernels, and the choice among the step's.
#include <algorithm>

#include "device.cuh"
#include "launch.h"

namespace layerpipe {
namespace {

template <class Work>
__global__ void __launch_bounds__(kThreads) tensor_kernel(const __grid_constant__ typename Work::Args args) {
    tensor_walk<Work>(args, blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x,
                      static_cast<int64_t>(gridDim.x) * blockDim.x);
}

template <class Work>
void launch_tensor(const typename Work::Args& args, CudaTarget target) {
    if (!args.numel) return;
    const OnDevice on(target.device);
    const int64_t blocks = std::min<int64_t>((args.numel + kGpuChunk - 1) / kGpuChunk * 4, 1 << 20);
    tensor_kernel<Work><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(target.stream)>>>(args);
    check(cudaGetLastError(), "launching a kernel of one tensor");
}

}  // namespace

template <class Rule, class W>
void cuda_step_of(const StepArgs<Rule>& args, int64_t chunks, Dtype average, int emas, CudaTarget target);

template <class Rule>
void cuda_step(const StepArgs<Rule>& args, int64_t chunks, Dtype weight, Dtype average, int emas, CudaTarget target) {
    if (!chunks) return;
    if constexpr (!Rule::kUpdates)
        return cuda_step_of<Rule, float>(args, chunks, average, emas, target);
    else
        switch (weight) {
            case Dtype::f32: return cuda_step_of<Rule, float>(args, chunks, average, emas, target);
            case Dtype::bf16: return cuda_step_of<Rule, bf16>(args, chunks, average, emas, target);
            case Dtype::f16: return cuda_step_of<Rule, f16>(args, chunks, average, emas, target);
            default: throw std::invalid_argument("the CUDA step takes float32, bfloat16 and float16");
        }
}

template void cuda_step<Sgd<float>>(const StepArgs<Sgd<float>>&, int64_t, Dtype, Dtype, int, CudaTarget);
template void cuda_step<Adam<float>>(const StepArgs<Adam<float>>&, int64_t, Dtype, Dtype, int, CudaTarget);
template void cuda_step<AdamDirection<float>>(const StepArgs<AdamDirection<float>>&, int64_t, Dtype, Dtype, int,
                                              CudaTarget);
template void cuda_step<Direction<float>>(const StepArgs<Direction<float>>&, int64_t, Dtype, Dtype, int, CudaTarget);

void cuda_reconstruct(const ReconstructArgs& args, Dtype out, CudaTarget target) {
    switch (out) {
        case Dtype::f32: return launch_tensor<Reconstruct<float>>(args, target);
        case Dtype::bf16: return launch_tensor<Reconstruct<bf16>>(args, target);
        case Dtype::f16: return launch_tensor<Reconstruct<f16>>(args, target);
        default: throw std::invalid_argument("the CUDA reconstruction takes float32, bfloat16 and float16");
    }
}

void cuda_ema_update(const EmaArgs& args, Dtype update, CudaTarget target) {
    switch (update) {
        case Dtype::f32: return launch_tensor<EmaUpdate<float>>(args, target);
        case Dtype::bf16: return launch_tensor<EmaUpdate<bf16>>(args, target);
        case Dtype::f16: return launch_tensor<EmaUpdate<f16>>(args, target);
        default: throw std::invalid_argument("the CUDA average takes float32, bfloat16 and float16");
    }
}

}  // namespace layerpipe
