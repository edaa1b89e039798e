#include "launch.h"

#include <algorithm>
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

}  // namespace

// Threads are started per call: a step large enough to share takes milliseconds, a start microseconds, and no idle
// pool competes with torch's own threads or breaks after a fork.
//
// Nobody waits for a thread, only for chunks: where torch's threads still spin after an operation, one that has just
// been started may come to run milliseconds after this one has done all the work. It then finds nothing to do, and does
// not look at `work`, which is gone.
void parallel_chunks(size_t chunks, int64_t numel, int threads, const std::function<void(size_t)>& work) {
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

namespace {

template <class Work>
void parallel_range(void (*run)(const Work&, int64_t, int64_t), const Work& work, int threads) {
    const size_t chunks = static_cast<size_t>((work.numel + kCpuChunk - 1) / kCpuChunk);
    parallel_chunks(chunks, work.numel, threads, [&](size_t i) {
        const int64_t begin = static_cast<int64_t>(i) * kCpuChunk;
        run(work, begin, std::min(begin + kCpuChunk, work.numel));
    });
}

}  // namespace

void cpu_reconstruct(const Reconstruction& work, int threads) {
    const auto& set = instruction_set();
    parallel_range(work.out.dtype == Dtype::f64 ? set.f64.reconstruct : set.f32.reconstruct, work, threads);
}

void cpu_average(const Averages& work, int threads) {
    const auto& set = instruction_set();
    parallel_range(work.update.dtype == Dtype::f64 ? set.f64.average : set.f32.average, work, threads);
}

bool all_finite(const void* array, Dtype dtype, int64_t numel) { return instruction_set().finite(array, dtype, numel); }

}  // namespace layerpipe
