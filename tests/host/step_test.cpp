// The code of a GPU thread, called on the host in a loop over blocks and threads, beside the CPU's own step: both must
// write the same bits, every element, and nothing else. Meant to be compiled with -fsanitize=address,undefined.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../../csrc/cpu/launch.h"
#include "../../csrc/plan.h"
#include "../../csrc/walk.h"

using namespace layerpipe;

namespace {

// Memory of exactly `count` elements, `offset` elements behind an address that is a multiple of 16: where an access
// leaves it, the sanitizer stops.
class Memory {
   public:
    Memory(size_t count, Dtype dtype, size_t offset)
        : bytes_(count * size_of(dtype)),
          skip_(offset * size_of(dtype)),
          data_(static_cast<char*>(malloc(skip_ + bytes_))) {
        // malloc's own alignment is 16 bytes.
        if (reinterpret_cast<uintptr_t>(data_) % 16) abort();
    }
    Memory(const Memory& other)
        : bytes_(other.bytes_), skip_(other.skip_), data_(static_cast<char*>(malloc(skip_ + bytes_))) {
        memcpy(at(), other.at(), bytes_);
    }
    Memory& operator=(const Memory&) = delete;
    ~Memory() { free(data_); }
    char* at() const { return data_ + skip_; }
    uint64_t address() const { return reinterpret_cast<uint64_t>(at()); }
    size_t bytes() const { return bytes_; }

   private:
    size_t bytes_, skip_;
    char* data_;
};

struct Shape {
    Dtype weight, grad, average;
    int emas, states;
    bool master, past, counts, previous;
    size_t offset;
};

const char* const kNames[] = {"f32", "f64", "bf16", "f16"};

template <class Rule>
struct Group {
    Shape shape;
    std::vector<int64_t> numels;
    std::vector<Memory> weights, masters, grads, averages, pasts, counts, previous;
    std::vector<std::vector<Memory>> states;

    Group(const Shape& s, std::vector<int64_t> sizes, std::mt19937& random)
        : shape(s), numels(std::move(sizes)), states(s.states) {
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<Memory>& list, int64_t count, Dtype dtype, bool square = false) {
            Memory& m = list.emplace_back(static_cast<size_t>(count), dtype, s.offset);
            for (int64_t i = 0; i < count; ++i) {
                float x = normal(random);
                if (square) x *= x;
                if (dtype == Dtype::f32) memcpy(m.at() + 4 * i, &x, 4);
                const uint16_t half =
                    dtype == Dtype::bf16 ? round_to<bf16, float>(x).bits : round_to<f16, float>(x).bits;
                if (size_of(dtype) == 2) memcpy(m.at() + 2 * i, &half, 2);
            }
        };
        const auto poison = [&](std::vector<Memory>& list, int64_t count, Dtype dtype) {
            Memory& m = list.emplace_back(static_cast<size_t>(count), dtype, s.offset);
            memset(m.at(), 0xff, m.bytes());
        };
        for (const int64_t n : numels) {
            fill(weights, n, s.weight);
            fill(grads, n, s.grad);
            if (s.master) fill(masters, n, Dtype::f32);
            for (int j = 0; j < s.states; ++j) fill(states[j], n, Dtype::f32, j > 0);
            if (s.emas) fill(averages, n * s.emas, s.average);
            if (s.past) poison(pasts, n, s.weight);
            if (s.previous) fill(previous, n, Dtype::f32);
            if (s.counts) {
                const float count = static_cast<float>(n % 3);
                memcpy(counts.emplace_back(1, Dtype::f32, 0).at(), &count, 4);
            }
        }
    }

    static std::vector<uint64_t> addresses(const std::vector<Memory>& list) {
        std::vector<uint64_t> result;
        for (const Memory& m : list) result.push_back(m.address());
        return result;
    }

    GroupArrays arrays() const {
        std::vector<std::vector<uint64_t>> own;
        for (const auto& state : states) own.push_back(addresses(state));
        return {-1,
                shape.weight,
                shape.grad,
                shape.average,
                shape.emas,
                numels,
                addresses(weights),
                addresses(masters),
                addresses(counts),
                addresses(averages),
                addresses(pasts),
                addresses(previous),
                std::move(own)};
    }

    std::vector<const std::vector<Memory>*> written() const {
        std::vector<const std::vector<Memory>*> lists = {&weights, &masters, &averages, &pasts, &counts, &previous};
        for (const auto& state : states) lists.push_back(&state);
        return lists;
    }
};

Design design(int emas, int64_t delay) {
    Design d{delay, {}, {}, 1.5, 2.0, 0.9, false, 42, emas > 1 ? 0.25 : 0.0};
    for (int k = 0; k < emas; ++k) {
        d.decays.push_back(0.5 + 0.1 * k);
        d.taps.push_back(2.0 - k);
    }
    return d;
}

// A plan that runs the kernel's code on the host: the records and chunks are those that a GPU would read.
template <class Walk>
void walk(const Group<typename Walk::Rule>& group, const Design& d, const std::vector<double>& options,
          const Moment& moment, bool first, int64_t chunk, int threads) {
    typename Walk::Args args{};
    args.options = Walk::Rule::options(options.data());
    args.design = d.as<float>();
    args.moment = moment;
    args.float_grads = group.shape.grad != group.shape.weight;
    args.advance_clock = 1;
    args.tensors = static_cast<int>(group.numels.size());
    std::vector<Record> records;
    for (int i = 0; i < args.tensors; ++i) {
        Record r{};
        const auto take = [i](const std::vector<Memory>& list) { return list.empty() ? nullptr : list[i].at(); };
        r.weight = take(group.weights);
        r.master = take(group.masters);
        for (size_t j = 0; j < group.states.size(); ++j) r.state[j] = take(group.states[j]);
        r.ema = take(group.averages);
        r.past = take(group.pasts);
        r.previous = take(group.previous);
        r.count = reinterpret_cast<float*>(take(group.counts));
        r.numel = group.numels[i];
        records.push_back(r);
        args.grads[i] = group.grads[i].at();
        if (first) args.first[i / 32] |= 1u << (i % 32);
    }
    args.records = records.data();
    const std::vector<Chunk> chunks = make_chunks(group.numels, chunk);
    args.chunks = chunks.data();
    if (overflowed(args.moment)) return;
    for (const Chunk& c : chunks)
        for (int thread = 0; thread < threads; ++thread) Walk::chunk(args, c, thread, threads);
    for (int thread = 0; thread < threads; ++thread) Walk::count(args, thread, threads);
}

int cases = 0;

template <class Rule, class W, class E, int kEmas>
void check(const Shape& shape, const char* rule, const std::vector<double>& options, bool first, bool overflow,
           std::mt19937& random) {
    constexpr int kGroupThreads = 32;
    const int64_t chunk = 640;
    const std::vector<int64_t> sizes = {0,  1,  3,   4,   5,   7,         8,     9,         15,
                                        16, 17, 255, 256, 257, chunk - 1, chunk, chunk + 1, 3 * chunk + 8};
    const Group<Rule> original(shape, sizes, random);
    Group<Rule> on_cpu(original), on_gpu(original);
    int64_t clocks[2] = {3, 3};
    float horizons[2] = {5.0f, 5.0f};
    const float found_inf = overflow ? 1.0f : 0.0f, scale = 4.0f, lr = 0.05f;
    const Design d = design(kEmas, 5);

    auto plan = StepPlan::make(rule, on_cpu.arrays(), 128);
    plan->configure(options, d);
    for (size_t i = 0; i < sizes.size(); ++i) plan->grads[i] = on_cpu.grads[i].at();
    const auto moment = [&](int i) {
        return Moment{0.0, &lr, 0, clocks + i, &scale, &found_inf, 3.0, 0.0, horizons + i};
    };
    plan->step(moment(0), std::vector<uint8_t>(sizes.size(), first), {-1, nullptr, 2});
    with_constant<Rule::kLeast, Rule::kStates>(shape.states, [&](auto kept) {
        walk<StepWalk<Rule, W, E, kept, kEmas>>(on_gpu, d, options, moment(1), first, chunk, kGroupThreads);
    });

    const auto cpu = on_cpu.written(), gpu = on_gpu.written(), before = original.written();
    bool same = clocks[0] == clocks[1] && clocks[0] == 3 + !overflow;
    same = same && horizons[0] == horizons[1] && horizons[0] == (overflow ? 5.0f : 3.0f);
    for (size_t l = 0; l < cpu.size(); ++l)
        for (size_t i = 0; i < cpu[l]->size(); ++i) {
            const Memory &x = (*cpu[l])[i], &y = (*gpu[l])[i], &z = (*before[l])[i];
            same = same && memcmp(x.at(), y.at(), x.bytes()) == 0;
            if (overflow) same = same && memcmp(x.at(), z.at(), x.bytes()) == 0;
            // Every element of the poisoned past weights is written.
            const size_t element = size_of(shape.weight);
            if (!overflow && cpu[l] == &on_cpu.pasts)
                for (size_t at = 0; at < x.bytes(); at += element)
                    same = same && memcmp(y.at() + at, "\xff\xff\xff\xff", element) != 0;
        }
    ++cases;
    if (same) return;
    printf(
        "%s weights %s gradients %s averages %d x %s states %d master %d past %d counts %d previous %d offset %zu "
        "first %d overflow %d: "
        "CPU and GPU code differ\n",
        rule, kNames[int(shape.weight)], kNames[int(shape.grad)], shape.emas, kNames[int(shape.average)], shape.states,
        shape.master, shape.past, shape.counts, shape.previous, shape.offset, first, overflow);
    exit(1);
}

template <class Rule, class W, class E, int kEmas>
void all_arrays(const char* rule, const std::vector<std::vector<double>>& options, std::mt19937& random) {
    constexpr bool kHalf = sizeof(W) == 2;
    const bool adam = Rule::kLeast == 2;
    for (const bool wide_grad : {false, true})
        for (const bool master : {false, true})
            for (const bool previous : {false, true})
                for (const size_t offset : {0, 1}) {
                    if (!kHalf && (wide_grad || master)) continue;
                    if (previous && (!Rule::kUpdates || wide_grad)) continue;
                    Shape s{DtypeOf<W>::value,
                            wide_grad ? Dtype::f32 : DtypeOf<W>::value,
                            DtypeOf<E>::value,
                            kEmas,
                            0,
                            master,
                            true,
                            adam,
                            previous,
                            offset};
                    for (const bool past : {false, true})
                        for (int states = Rule::kLeast; states <= Rule::kStates; ++states) {
                            s.past = past && Rule::kUpdates;
                            s.states = states;
                            check<Rule, W, E, kEmas>(s, rule, options[cases % options.size()], !adam && cases % 2,
                                                     false, random);
                        }
                    s.counts = true;
                    check<Rule, W, E, kEmas>(s, rule, options[0], false, false, random);
                    check<Rule, W, E, kEmas>(s, rule, options[0], false, true, random);
                }
}

template <template <class> class Rule, class W>
void all_averages(const char* rule, const std::vector<std::vector<double>>& options, std::mt19937& random) {
    all_arrays<Rule<float>, W, float, 0>(rule, options, random);
    all_arrays<Rule<float>, W, float, 1>(rule, options, random);
    all_arrays<Rule<float>, W, float, 3>(rule, options, random);
    all_arrays<Rule<float>, W, bf16, 2>(rule, options, random);
}

// Memory that the CPU's code and a GPU thread's code write, each its own copy.
struct Twice {
    Memory cpu, gpu;
    Twice(size_t count, Dtype dtype, size_t offset, std::mt19937& random) : cpu(count, dtype, offset), gpu(cpu) {
        for (size_t i = 0; i < count * size_of(dtype); i += 2) {
            // Finite and near 1: 0x3c00 to 0x3fff are a half, a bfloat16 and the upper half of a float.
            const uint16_t bits = static_cast<uint16_t>(0x3c00 + random() % 0x400 + (random() % 2) * 0x8000);
            memcpy(cpu.at() + i, &bits, 2);
            memcpy(gpu.at() + i, &bits, 2);
        }
    }
    bool same() const { return memcmp(cpu.at(), gpu.at(), cpu.bytes()) == 0; }
};

void require_same(const Twice& written, const char* what, Dtype dtype, int arrays, size_t count, size_t offset) {
    ++cases;
    if (written.same()) return;
    printf("%s %s with %d of %zu elements, offset %zu: CPU and GPU code differ\n", what, kNames[int(dtype)], arrays,
           count, offset);
    exit(1);
}

// Past weights and averages of one tensor, with arrays of both types beside each other.
template <class W>
void tensors(std::mt19937& random) {
    constexpr Dtype kType = DtypeOf<W>::value;
    const Dtype kinds[] = {Dtype::f32, Dtype::bf16};
    for (const size_t count : {0, 1, 3, 4, 5, 127, 128, 129, 1000})
        for (const size_t offset : {0, 1, 2})
            for (int n = 0; n <= kMaxTerms; ++n) {
                std::vector<Twice> arrays;
                for (int k = 0; k < n; ++k) arrays.emplace_back(count, kinds[(k + n) % 2], offset, random);
                Twice out(count, kType, offset, random), weight(count, n % 2 ? Dtype::f32 : kType, offset, random);
                const auto reconstruction = [&](const auto& at) {
                    Reconstruction work{
                        {at(out), kType},           {at(weight), n % 2 ? Dtype::f32 : kType}, n, {}, {}, nullptr,
                        static_cast<int64_t>(count)};
                    for (int k = 0; k < n; ++k) {
                        work.term[k] = {at(arrays[k]), kinds[(k + n) % 2]};
                        work.tap[k] = 0.3 - k;
                    }
                    return work;
                };
                const auto averages = [&](const auto& at) {
                    Averages work{{},
                                  {},
                                  n > 1 ? 0.1 : 0.0,
                                  {},
                                  n,
                                  {at(weight), n % 2 ? Dtype::f32 : kType},
                                  static_cast<int64_t>(count)};
                    for (int k = 0; k < std::min(n, kMaxEmas); ++k) {
                        work.ema[k] = {at(arrays[k]), kinds[(k + n) % 2]};
                        work.decay[k] = 0.5 + 0.1 * k;
                        work.key[k] = hash32(k);
                    }
                    return work;
                };
                const auto on_cpu = [](const Twice& m) { return m.cpu.at(); };
                const auto on_gpu = [](const Twice& m) { return m.gpu.at(); };
                constexpr int kGroupThreads = 32;
                cpu_reconstruct(reconstruction(on_cpu), 1);
                with_constant<0, kMaxTerms>(n, [&](auto terms) {
                    for (int t = 0; t < kGroupThreads; ++t)
                        ReconstructWalk<W, terms>::run(reconstruction(on_gpu), t, kGroupThreads);
                });
                require_same(out, "past weights", kType, n, count, offset);
                if (n == 0 || n > kMaxEmas || (n % 2 == 0 && kType == Dtype::f32)) continue;
                cpu_average(averages(on_cpu), 1);
                with_constant<1, kMaxEmas>(n, [&](auto emas) {
                    for (int t = 0; t < kGroupThreads; ++t) {
                        if (n % 2)
                            AverageWalk<float, emas>::run(averages(on_gpu), t, kGroupThreads);
                        else
                            AverageWalk<W, emas>::run(averages(on_gpu), t, kGroupThreads);
                    }
                });
                for (const Twice& array : arrays) require_same(array, "averages", kType, n, count, offset);
            }
}

// Every 16-bit number to float and back.
void conversions() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const bf16 b{static_cast<uint16_t>(bits)};
        const f16 h{static_cast<uint16_t>(bits)};
        const float x = to_compute(b), y = to_compute(h);
        const bool b_kept = x != x ? (bits & 0x7fff) > 0x7f80
                                   : round_to<bf16, float>(x).bits == bits && round_stochastic(x, 0xffff).bits == bits;
        const bool h_kept = y != y ? (bits & 0x7fff) > 0x7c00 : round_to<f16, float>(y).bits == bits;
        if (!b_kept || !h_kept) {
            printf("0x%04x does not survive a conversion\n", bits);
            exit(1);
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    conversions();
    const std::vector<std::vector<double>> sgd = {
        {0.9, 0.0, 0.01, 1, 0, 0.0}, {0.9, 0.3, 0.0, 0, 1, 0.4}, {0.5, 0.0, 0.1, 0, 0, 0.0}};
    const std::vector<std::vector<double>> adam = {
        {0.9, 0.999, 1e-8, 0.01, 1, 0, 0.3}, {0.3, 0.9, 1e-3, 0.1, 0, 1, 0.0}, {0.0, 0.5, 1e-8, 0.0, 1, 0, 1.0}};
    const std::vector<std::vector<double>> direction = {{0.01}, {0.0}};
    all_averages<Sgd, float>("sgd", sgd, random);
    all_averages<Sgd, bf16>("sgd", sgd, random);
    all_averages<Sgd, f16>("sgd", sgd, random);
    all_averages<Adam, float>("adam", adam, random);
    all_averages<Adam, bf16>("adam", adam, random);
    all_averages<Adam, f16>("adam", adam, random);
    all_averages<Direction, float>("direction", direction, random);
    all_averages<Direction, bf16>("direction", direction, random);
    all_averages<Direction, f16>("direction", direction, random);
    all_arrays<AdamDirection<float>, float, float, 0>("adam_direction", adam, random);
    tensors<float>(random);
    tensors<bf16>(random);
    tensors<f16>(random);
    printf("%d cases\n", cases);
}
