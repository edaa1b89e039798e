#include "run.h"

#if defined(LP_CUDA)
#include "cuda/launch.h"
#endif

namespace layerpipe {
namespace {

#if defined(LP_CUDA)
int32_t mask(const std::vector<int>& dtypes) {
    int32_t bits = 0;
    for (size_t i = 0; i < dtypes.size(); ++i) bits |= static_cast<int32_t>(dtype_of(dtypes[i]) == Dtype::bf16) << i;
    return bits;
}

bool aligned(std::initializer_list<uint64_t> some, const std::vector<uint64_t>& others) {
    uint64_t bits = 0;
    for (const uint64_t p : some) bits |= p;
    for (const uint64_t p : others) bits |= p;
    return bits % 16 == 0;
}
#endif

}  // namespace

Dtype dtype_of(int number) {
    require(number >= 0 && number <= static_cast<int>(Dtype::f16), "an unknown dtype");
    return static_cast<Dtype>(number);
}

void run_reconstruct(int device, uint64_t out, int out_dtype, uint64_t weight, int weight_dtype, int64_t numel,
                     const std::vector<uint64_t>& terms, const std::vector<int>& dtypes,
                     const std::vector<double>& taps, uint64_t taps_at, uint64_t stream, int threads) {
    const size_t n = terms.size();
    require(n <= kMaxTerms && dtypes.size() == n && (taps.size() == n || taps_at),
            "reconstruct: 0 to 4 terms, one dtype and one tap each");
    if (device < 0) {
        require(taps.size() == n, "reconstruct: taps are numbers on the CPU");
        Reconstruction r{{at<void*>(out), dtype_of(out_dtype)},
                         {at<void*>(weight), dtype_of(weight_dtype)},
                         {},
                         {},
                         static_cast<int>(n)};
        for (size_t k = 0; k < n; ++k) {
            r.term[k] = {at<void*>(terms[k]), dtype_of(dtypes[k])};
            r.tap[k] = taps[k];
        }
        return run_unlocked(numel > kSmallWork, [&] { cpu_reconstruct(r, numel, threads); });
    }
#if defined(LP_CUDA)
    ReconstructArgs a{};
    a.out = at<void*>(out);
    a.weight = at<const void*>(weight);
    a.taps_at = at<const float*>(taps_at);
    a.numel = numel;
    a.terms = static_cast<int32_t>(n);
    a.half_terms = mask(dtypes);
    a.float_weight = weight_dtype != out_dtype;
    a.aligned = aligned({out, weight}, terms);
    for (size_t k = 0; k < n; ++k) {
        a.term[k] = at<const void*>(terms[k]);
        a.tap[k] = taps.empty() ? 0.0f : static_cast<float>(taps[k]);
    }
    cuda_reconstruct(a, dtype_of(out_dtype), {device, at<void*>(stream)});
#else
    (void)stream;
    throw std::invalid_argument("reconstruct: built without CUDA");
#endif
}

void run_ema_update(int device, const std::vector<uint64_t>& emas, const std::vector<int>& dtypes, uint64_t update,
                    int update_dtype, int64_t numel, const std::vector<double>& decays, uint32_t seed, double turn,
                    uint64_t stream, int threads) {
    const size_t n = emas.size();
    require(n <= kMaxEmas && dtypes.size() == n && decays.size() == n,
            "ema_update: 0 to 3 EMAs, one dtype and one decay each");
    require(turn == 0.0 || n > 1, "ema_update: two averages turn, not fewer");
    uint32_t key[kMaxEmas];
    for (uint32_t k = 0; k < kMaxEmas; ++k) key[k] = hash32(hash32(seed) + k);
    if (device < 0) {
        Averages a{};
        a.emas = static_cast<int>(n);
        a.update = {at<void*>(update), dtype_of(update_dtype)};
        a.turn = turn;
        for (size_t k = 0; k < n; ++k) {
            a.ema[k] = {at<void*>(emas[k]), dtype_of(dtypes[k])};
            a.decay[k] = decays[k];
            a.one_minus_decay[k] = 1.0 - decays[k];
            a.key[k] = key[k];
        }
        return run_unlocked(numel > kSmallWork, [&] { cpu_ema_update(a, numel, threads); });
    }
#if defined(LP_CUDA)
    EmaArgs a{};
    a.update = at<const void*>(update);
    a.turn = static_cast<float>(turn);
    a.numel = numel;
    a.emas = static_cast<int32_t>(n);
    a.half_emas = mask(dtypes);
    a.aligned = aligned({update}, emas);
    for (size_t k = 0; k < n; ++k) {
        a.ema[k] = at<void*>(emas[k]);
        a.decay[k] = static_cast<float>(decays[k]);
        a.one_minus_decay[k] = static_cast<float>(1.0 - decays[k]);
        a.key[k] = key[k];
    }
    cuda_ema_update(a, dtype_of(update_dtype), {device, at<void*>(stream)});
#else
    (void)stream;
    throw std::invalid_argument("ema_update: built without CUDA");
#endif
}

void run_past(const StepPlan& plan, size_t i, uint64_t out, double newest_tap, const std::vector<double>& ema_taps,
              uint64_t stream, int threads) {
    const GroupArrays& a = plan.arrays();
    const Record& r = plan.record(i);
    const Dtype full = a.weight == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    require(ema_taps.size() <= static_cast<size_t>(a.emas), "past: more taps than averages");
    std::vector<uint64_t> terms;
    std::vector<int> dtypes;
    std::vector<double> taps;
    const auto add = [&](const void* term, Dtype dtype, double tap) {
        terms.push_back(reinterpret_cast<uint64_t>(term));
        dtypes.push_back(static_cast<int>(dtype));
        taps.push_back(tap);
    };
    const void* const newest = r.previous ? r.previous : r.state[0];
    if (newest_tap != 0.0 && newest) add(newest, full, newest_tap);
    for (size_t k = 0; k < ema_taps.size(); ++k)
        add(static_cast<const char*>(r.ema) + k * static_cast<size_t>(r.numel) * size_of(a.average), a.average,
            ema_taps[k]);
    const void* const weight = r.master ? r.master : r.weight;
    run_reconstruct(a.device, out, static_cast<int>(a.weight), reinterpret_cast<uint64_t>(weight),
                    static_cast<int>(r.master ? Dtype::f32 : a.weight), r.numel, terms, dtypes, taps, 0, stream,
                    threads);
}

void run_step(StepPlan& plan, const Moment& moment, const std::vector<uint8_t>& first, uint64_t stream, int threads) {
    run_unlocked(plan.numel() > kSmallWork && plan.arrays().device < 0,
                 [&] { plan.step(moment, first, at<void*>(stream), threads); });
}

}  // namespace layerpipe
