#include "plan.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace layerpipe {

extern const InstructionSet instruction_set_baseline;
#if defined(LP_X86)
extern const InstructionSet instruction_set_avx2, instruction_set_avx512;
#endif

const InstructionSet& instruction_set() {
    static const InstructionSet& chosen = []() -> const InstructionSet& {
#if defined(LP_X86)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return instruction_set_avx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return instruction_set_avx2;
#endif
        return instruction_set_baseline;
    }();
    return chosen;
}

namespace {

template <class T>
const SpanKernels<T>& kernels();
template <>
const SpanKernels<float>& kernels<float>() {
    return instruction_set().f32;
}
template <>
const SpanKernels<double>& kernels<double>() {
    return instruction_set().f64;
}

// Threads are started per call: a step large enough to share takes milliseconds, a start microseconds, and no idle
// pool competes with torch's own threads or breaks after a fork.
template <class Work>
void parallel_chunks(size_t chunks, int64_t numel, int threads, const Work& work) {
    if (threads <= 1 || numel <= 4 * kSmallWork || chunks <= 1) {
        for (size_t i = 0; i < chunks; ++i) work(i);
        return;
    }
    std::atomic<size_t> next{0};
    auto run = [&] {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) work(i);
    };
    std::vector<std::thread> helpers;
    const size_t wanted = std::min<size_t>(threads, chunks) - 1;
    helpers.reserve(wanted);
    try {
        while (helpers.size() < wanted) helpers.emplace_back(run);
    } catch (const std::system_error&) {
        // No thread to be had: those that started, and this one, do the work.
    }
    run();
    for (auto& helper : helpers) helper.join();
}

template <class Work>
void parallel_range(int64_t numel, int threads, const Work& work) {
    const size_t chunks = static_cast<size_t>((numel + kChunk - 1) / kChunk);
    parallel_chunks(chunks, numel, threads, [&](size_t i) {
        const int64_t begin = static_cast<int64_t>(i) * kChunk;
        work(begin, std::min(begin + kChunk, numel));
    });
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

template <class T>
StepPlan<T>::StepPlan(std::vector<int64_t> numels, std::vector<uint64_t> weights, std::vector<uint64_t> velocities,
                      std::vector<uint64_t> emas, int ema_count, std::vector<uint64_t> pasts)
    : numels_(std::move(numels)), chunks_(make_chunks(numels_)), ema_count_(ema_count) {
    const size_t n = numels_.size();
    require(ema_count >= 0 && ema_count <= kMaxEmas, "StepPlan: 0 to 3 EMAs");
    require(weights.size() == n, "StepPlan: one weight pointer per tensor");
    require(velocities.empty() || velocities.size() == n, "StepPlan: one velocity per tensor or none");
    require(emas.size() == (ema_count ? n : 0), "StepPlan: one EMA block per tensor or none");
    require(pasts.empty() || pasts.size() == n, "StepPlan: one past pointer per tensor or none");
    arrays_.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        require(numels_[i] >= 0, "StepPlan: negative size");
        numel_ += numels_[i];
        arrays_.push_back({reinterpret_cast<T*>(weights[i]), nullptr,
                           velocities.empty() ? nullptr : reinterpret_cast<T*>(velocities[i]),
                           ema_count ? reinterpret_cast<T*>(emas[i]) : nullptr,
                           pasts.empty() ? nullptr : reinterpret_cast<T*>(pasts[i]), numels_[i], ema_count, false});
    }
}

template <class T>
void StepPlan<T>::sgd_step(const std::vector<uint64_t>& grads, const std::vector<uint8_t>& first, const SgdOptions& o,
                           int threads) {
    require(grads.size() == arrays_.size(), "sgd_step: one gradient pointer per tensor");
    require(first.size() == arrays_.size(), "sgd_step: one `first` flag per tensor");
    require(o.decays.size() == static_cast<size_t>(ema_count_), "sgd_step: one decay per EMA");
    require(o.taps.size() == static_cast<size_t>(ema_count_), "sgd_step: one tap per EMA");
    SgdScalars<T> s{};
    s.lr = static_cast<T>(o.lr);
    s.momentum = static_cast<T>(o.momentum);
    s.one_minus_dampening = static_cast<T>(1.0 - o.dampening);
    s.weight_decay = static_cast<T>(o.weight_decay);
    s.sign = o.maximize ? T(-1) : T(1);
    s.nesterov = o.nesterov;
    s.ema_of_gradient = o.ema_of_gradient;
    s.tap_update = static_cast<T>(o.tap_update);
    for (int k = 0; k < ema_count_; ++k) {
        s.decay[k] = static_cast<T>(o.decays[k]);
        s.one_minus_decay[k] = static_cast<T>(1.0 - o.decays[k]);
        s.tap[k] = static_cast<T>(o.taps[k]);
    }
    for (size_t i = 0; i < arrays_.size(); ++i) {
        arrays_[i].grad = reinterpret_cast<const T*>(grads[i]);
        arrays_[i].first = first[i] != 0;
    }
    const auto sgd = kernels<T>().sgd;
    parallel_chunks(chunks_.size(), numel_, threads, [&](size_t i) {
        const Chunk& c = chunks_[i];
        sgd(arrays_[c.tensor], s, c.begin, c.end);
    });
}

template <class T>
void ema_update(const EmaArrays<T>& arrays, int64_t numel, int threads) {
    const auto ema = kernels<T>().ema;
    parallel_range(numel, threads, [&](int64_t begin, int64_t end) { ema(arrays, begin, end); });
}

template <class T>
void reconstruct(const Reconstruction<T>& arrays, int64_t numel, int threads) {
    const auto run = kernels<T>().reconstruct;
    parallel_range(numel, threads, [&](int64_t begin, int64_t end) { run(arrays, begin, end); });
}

template class StepPlan<float>;
template class StepPlan<double>;
template void ema_update<float>(const EmaArrays<float>&, int64_t, int);
template void ema_update<double>(const EmaArrays<double>&, int64_t, int);
template void reconstruct<float>(const Reconstruction<float>&, int64_t, int);
template void reconstruct<double>(const Reconstruction<double>&, int64_t, int);

}  // namespace layerpipe
