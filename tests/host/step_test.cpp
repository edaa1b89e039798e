// The code of a GPU thread, called on the host in a loop over blocks and threads, beside the CPU's own step: both must
// write the same bits, every element, and nothing else. Meant to be compiled with -fsanitize=address,undefined.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

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
template <class Rule, class W, class E, int kEmas>
void walk(const Group<Rule>& group, const Design& d, const std::vector<double>& options, const Moment& moment,
          bool first, int64_t chunk, int threads) {
    StepArgs<Rule> args{};
    args.options = Rule::options(options.data());
    args.design.delay = d.delay;
    args.design.tap_update = static_cast<float>(d.tap_update);
    args.design.fill_tap = static_cast<float>(d.fill_tap);
    args.design.fill_ratio = static_cast<float>(d.fill_ratio);
    args.design.seed = d.seed;
    args.design.turn = static_cast<float>(d.turn);
    for (int k = 0; k < kEmas; ++k) {
        args.design.decay[k] = static_cast<float>(d.decays[k]);
        args.design.one_minus_decay[k] = static_cast<float>(1.0 - d.decays[k]);
        args.design.tap[k] = static_cast<float>(d.taps[k]);
    }
    args.moment = moment;
    args.float_grads = group.shape.grad != group.shape.weight;
    args.advance_clock = 1;
    args.tensors = static_cast<int>(group.numels.size());
    std::vector<Record> records;
    for (size_t i = 0; i < group.numels.size(); ++i) {
        Record r{};
        uint64_t bits = 0;
        const auto take = [&](const std::vector<Memory>& list) -> void* {
            if (list.empty()) return nullptr;
            bits |= list[i].address();
            return list[i].at();
        };
        r.weight = take(group.weights);
        r.master = take(group.masters);
        for (size_t j = 0; j < group.states.size(); ++j) r.state[j] = take(group.states[j]);
        r.ema = take(group.averages);
        r.past = take(group.pasts);
        r.previous = take(group.previous);
        r.count = group.counts.empty() ? nullptr : reinterpret_cast<float*>(group.counts[i].at());
        r.numel = group.numels[i];
        if (kEmas > 1) bits |= static_cast<uint64_t>(r.numel) * sizeof(E);
        r.aligned = bits % 16 == 0;
        records.push_back(r);
        args.grads[i] = group.grads[i].at();
        if (first) args.first[i / 32] |= 1u << (i % 32);
    }
    args.records = records.data();
    const std::vector<Chunk> chunks = make_chunks(group.numels, chunk);
    args.chunks = chunks.data();
    if (overflowed(args.moment)) return;
    for (const Chunk& c : chunks)
        for (int thread = 0; thread < threads; ++thread) step_chunk<Rule, W, E, kEmas>(args, c, thread, threads);
    for (int thread = 0; thread < threads; ++thread) count_step(args, thread, threads);
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
    plan->step(moment(0), std::vector<uint8_t>(sizes.size(), first), nullptr, 2);
    walk<Rule, W, E, kEmas>(on_gpu, d, options, moment(1), first, chunk, kGroupThreads);

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

// How many kinds of state a rule may keep.
struct Kinds {
    int least, most;
};

template <class Rule, class W, class E, int kEmas>
void all_arrays(const char* rule, Kinds kinds, const std::vector<std::vector<double>>& options, std::mt19937& random) {
    constexpr bool kHalf = sizeof(W) == 2;
    const bool adam = kinds.least == 2;
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
                        for (int states = kinds.least; states <= kinds.most; ++states) {
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
void all_averages(const char* rule, Kinds kinds, const std::vector<std::vector<double>>& options,
                  std::mt19937& random) {
    all_arrays<Rule<float>, W, float, 0>(rule, kinds, options, random);
    all_arrays<Rule<float>, W, float, 1>(rule, kinds, options, random);
    all_arrays<Rule<float>, W, float, 3>(rule, kinds, options, random);
    all_arrays<Rule<float>, W, bf16, 2>(rule, kinds, options, random);
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
    all_averages<Sgd, float>("sgd", {0, 1}, sgd, random);
    all_averages<Sgd, bf16>("sgd", {0, 1}, sgd, random);
    all_averages<Sgd, f16>("sgd", {0, 1}, sgd, random);
    all_averages<Adam, float>("adam", {2, 3}, adam, random);
    all_averages<Adam, bf16>("adam", {2, 3}, adam, random);
    all_averages<Adam, f16>("adam", {2, 3}, adam, random);
    all_averages<Direction, float>("direction", {0, 0}, direction, random);
    all_averages<Direction, bf16>("direction", {0, 0}, direction, random);
    all_averages<Direction, f16>("direction", {0, 0}, direction, random);
    all_arrays<AdamDirection<float>, float, float, 0>("adam_direction", {2, 2}, adam, random);
    printf("%d cases\n", cases);
}
