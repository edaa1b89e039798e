#include "launch.h"

#include <atomic>
#include <memory>
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

// What the threads of one call share; the last of them that lets go frees it.
struct Progress {
    std::atomic<size_t> next{0}, done{0};
};

// Threads are started per call: a step large enough to share takes milliseconds, a start microseconds, and no idle
// pool competes with torch's own threads or breaks after a fork.
//
// Nobody waits for a thread, only for chunks: where torch's threads still spin after an operation, one that has just
// been started may come to run milliseconds after this one has done all the work. It then finds nothing to do, and does
// not look at `work`, which is gone.
template <class Work>
void parallel_chunks(size_t chunks, int64_t numel, int threads, const Work& work) {
    if (threads <= 1 || numel <= 4 * kSmallWork || chunks <= 1) {
        for (size_t i = 0; i < chunks; ++i) work(i);
        return;
    }
    const auto progress = std::make_shared<Progress>();
    const auto run = [progress, chunks, &work] {
        for (size_t i; (i = progress->next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
            work(i);
            progress->done.fetch_add(1, std::memory_order_release);
        }
    };
    const size_t wanted = std::min<size_t>(threads, chunks) - 1;
    try {
        for (size_t i = 0; i < wanted; ++i) std::thread(run).detach();
    } catch (const std::system_error&) {
        // No thread to be had: those that started, and this one, do the work.
    }
    run();
    while (progress->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
}

template <class Work>
void parallel_range(int64_t numel, int threads, const Work& work) {
    const size_t chunks = static_cast<size_t>((numel + kCpuChunk - 1) / kCpuChunk);
    parallel_chunks(chunks, numel, threads, [&](size_t i) {
        const int64_t begin = static_cast<int64_t>(i) * kCpuChunk;
        work(begin, std::min(begin + kCpuChunk, numel));
    });
}

StepSpan<Sgd<float>> span(const Sgd<float>*) { return instruction_set().f32.sgd; }
StepSpan<Sgd<double>> span(const Sgd<double>*) { return instruction_set().f64.sgd; }
StepSpan<Adam<float>> span(const Adam<float>*) { return instruction_set().f32.adam; }
StepSpan<Adam<double>> span(const Adam<double>*) { return instruction_set().f64.adam; }
StepSpan<AdamDirection<float>> span(const AdamDirection<float>*) { return instruction_set().f32.adam_direction; }
StepSpan<AdamDirection<double>> span(const AdamDirection<double>*) { return instruction_set().f64.adam_direction; }
StepSpan<Direction<float>> span(const Direction<float>*) { return instruction_set().f32.direction; }
StepSpan<Direction<double>> span(const Direction<double>*) { return instruction_set().f64.direction; }

}  // namespace

template <class Rule>
void cpu_step(const CpuStep<Rule>& s, int threads) {
    const auto run = span(static_cast<const Rule*>(nullptr));
    parallel_chunks(s.chunks.size(), s.numel, threads, [&](size_t i) {
        const Chunk& c = s.chunks[i];
        run(s.records[c.tensor], s.grads[c.tensor], s.layout, s.scalars[c.tensor], c.begin, c.begin + c.count);
    });
}

template void cpu_step<Sgd<float>>(const CpuStep<Sgd<float>>&, int);
template void cpu_step<Sgd<double>>(const CpuStep<Sgd<double>>&, int);
template void cpu_step<Adam<float>>(const CpuStep<Adam<float>>&, int);
template void cpu_step<Adam<double>>(const CpuStep<Adam<double>>&, int);
template void cpu_step<AdamDirection<float>>(const CpuStep<AdamDirection<float>>&, int);
template void cpu_step<AdamDirection<double>>(const CpuStep<AdamDirection<double>>&, int);
template void cpu_step<Direction<float>>(const CpuStep<Direction<float>>&, int);
template void cpu_step<Direction<double>>(const CpuStep<Direction<double>>&, int);

void cpu_reconstruct(const Reconstruction& work, int64_t numel, int threads) {
    const auto& set = instruction_set();
    const auto run = work.out.dtype == Dtype::f64 ? set.f64.reconstruct : set.f32.reconstruct;
    parallel_range(numel, threads, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

void cpu_ema_update(const Averages& work, int64_t numel, int threads) {
    const auto& set = instruction_set();
    const auto run = work.update.dtype == Dtype::f64 ? set.f64.average : set.f32.average;
    parallel_range(numel, threads, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

bool all_finite(const void* array, Dtype dtype, int64_t numel) { return instruction_set().finite(array, dtype, numel); }

}  // namespace layerpipe
