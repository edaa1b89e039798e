#include "launch.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
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

// One call's chunks. The last thread that lets go frees it.
struct Job {
    const std::function<void(size_t)>& work;  // gone when all chunks are done
    const size_t chunks;
    std::atomic<size_t> next{0}, done{0};

    bool taken() const { return next.load(std::memory_order_relaxed) >= chunks; }
    void run() {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
            work(i);
            done.fetch_add(1, std::memory_order_release);
        }
    }
};

// Threads that sleep until there is a job: waking one costs a fraction of starting one, which a step of a megabyte
// would feel. Never destroyed, so that none outlives it.
class Helpers {
   public:
    static Helpers& instance() {
        // A fork has no threads.
        static const int registered = pthread_atfork(nullptr, nullptr, [] { helpers_ = new Helpers; });
        (void)registered;
        return *helpers_;
    }

    // Up to `wanted` threads take part in a job, each when it comes to it.
    void help(const std::shared_ptr<Job>& job, size_t wanted) {
        const std::lock_guard<std::mutex> lock(mutex_);
        // Of callers that did without help in the end.
        jobs_.erase(std::remove_if(jobs_.begin(), jobs_.end(), [](const auto& old) { return old->taken(); }),
                    jobs_.end());
        jobs_.insert(jobs_.end(), wanted, job);
        try {
            for (; idle_ < jobs_.size(); ++idle_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // No thread to be had: those that started, and the caller, do the work.
        }
        for (size_t i = 0; i < wanted; ++i) waiting_.notify_one();
    }

   private:
    [[noreturn]] void serve() {
        for (std::unique_lock<std::mutex> lock(mutex_);;) {
            waiting_.wait(lock, [this] { return !jobs_.empty(); });
            std::shared_ptr<Job> job = std::move(jobs_.front());
            jobs_.pop_front();
            --idle_;
            lock.unlock();
            job->run();
            job.reset();
            lock.lock();
            ++idle_;
        }
    }

    static Helpers* helpers_;
    std::mutex mutex_;
    std::condition_variable waiting_;
    std::deque<std::shared_ptr<Job>> jobs_;
    size_t idle_ = 0;
};

Helpers* Helpers::helpers_ = new Helpers;

}  // namespace

// Nobody waits for a thread, only for chunks: where torch's threads still spin after an operation, a helper may come to
// run milliseconds after the caller has done all the work. It then finds nothing to do, and does not look at `work`,
// which is gone.
void parallel_chunks(size_t chunks, int64_t numel, int threads, const std::function<void(size_t)>& work) {
    if (threads <= 1 || numel <= 4 * kSmallWork || chunks <= 1) {
        for (size_t i = 0; i < chunks; ++i) work(i);
        return;
    }
    const auto job = std::shared_ptr<Job>(new Job{work, chunks});
    Helpers::instance().help(job, std::min<size_t>(threads, chunks) - 1);
    job->run();
    while (job->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
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
