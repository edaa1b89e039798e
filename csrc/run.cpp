#include "run.h"

#if defined(LP_CUDA)
#include "cuda/launch.h"
#endif

namespace layerpipe {

Dtype dtype_of(int number) {
    require(number >= 0 && number <= static_cast<int>(Dtype::f16), "an unknown dtype");
    return static_cast<Dtype>(number);
}

void run_reconstruct(const Reconstruction& work, const Target& target) {
    if (target.device < 0) return run_unlocked(work.numel > kSmallWork, [&] { cpu_reconstruct(work, target.threads); });
#if defined(LP_CUDA)
    cuda_reconstruct(work, target);
#else
    throw std::invalid_argument("reconstruct: built without CUDA");
#endif
}

void run_average(const Averages& work, const Target& target) {
    if (target.device < 0) return run_unlocked(work.numel > kSmallWork, [&] { cpu_average(work, target.threads); });
#if defined(LP_CUDA)
    cuda_average(work, target);
#else
    throw std::invalid_argument("ema_update: built without CUDA");
#endif
}

void run_past(const StepPlan& plan, size_t i, void* out, double newest_tap, const std::vector<double>& ema_taps,
              const Target& target) {
    const GroupArrays& a = plan.arrays();
    const Record& r = plan.record(i);
    const Dtype full = a.weight == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    require(ema_taps.size() <= static_cast<size_t>(a.emas), "past: more taps than averages");
    Reconstruction work{
        {out, a.weight}, r.master ? Array{r.master, full} : Array{r.weight, a.weight}, 0, {}, {}, nullptr, r.numel};
    const auto add = [&work](void* term, Dtype dtype, double tap) {
        work.term[work.terms] = {term, dtype};
        work.tap[work.terms++] = tap;
    };
    void* const newest = r.previous ? r.previous : r.state[0];
    if (newest_tap != 0.0 && newest) add(newest, full, newest_tap);
    for (size_t k = 0; k < ema_taps.size(); ++k)
        add(static_cast<char*>(r.ema) + k * static_cast<size_t>(r.numel) * size_of(a.average), a.average, ema_taps[k]);
    run_reconstruct(work, target);
}

void run_step(StepPlan& plan, const Moment& moment, const std::vector<uint8_t>& first, const Target& target) {
    run_unlocked(plan.numel() > kSmallWork && target.device < 0, [&] { plan.step(moment, first, target); });
}

}  // namespace layerpipe
