// Module layerpipe_kernels._C: raw pointers in, nothing of torch. Checks on tensors are made in Python, where a message
// can name the parameter.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "collect.h"
#include "cpu/launch.h"
#include "plan.h"
#if defined(LP_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using namespace py::literals;
using namespace layerpipe;

namespace {

Dtype dtype_of(int number) {
    require(number >= 0 && number <= static_cast<int>(Dtype::f16), "an unknown dtype");
    return static_cast<Dtype>(number);
}

// Giving up the interpreter lock for a few microseconds of work costs more than it frees.
template <class Work>
void run_unlocked(bool large, const Work& work) {
    std::optional<py::gil_scoped_release> released;
    if (large) released.emplace();
    work();
}

template <class P>
P at(uint64_t address) {
    return reinterpret_cast<P>(address);
}

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

// The past weights of a plan's `i`-th tensor: by the momentum buffer, where it has a tap, and its first averages.
void run_past(const StepPlan& plan, size_t i, uint64_t out, double velocity_tap, const std::vector<double>& ema_taps,
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
    if (velocity_tap != 0.0 && r.state[0]) add(r.state[0], full, velocity_tap);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Fused optimizer step, EMA of updates and past-weight reconstruction.";
    // Numbers, because converting an enumeration costs more than the rest of a call.
    m.attr("DTYPES") =
        py::dict("float32"_a = static_cast<int>(Dtype::f32), "float64"_a = static_cast<int>(Dtype::f64),
                 "bfloat16"_a = static_cast<int>(Dtype::bf16), "float16"_a = static_cast<int>(Dtype::f16));

    py::class_<StepPlan>(m, "StepPlan", "Arrays and chunks of one parameter group; built once, run every step.")
        .def(py::init([](const std::string& rule, int device, int weight, int grad, int average, int emas,
                         std::vector<int64_t> numels, std::vector<uint64_t> weights, std::vector<uint64_t> masters,
                         std::vector<std::vector<uint64_t>> states, std::vector<uint64_t> averages,
                         std::vector<uint64_t> pasts, std::vector<uint64_t> counts, int64_t chunk) {
                 return StepPlan::make(rule,
                                       {device, dtype_of(weight), dtype_of(grad), dtype_of(average), emas,
                                        std::move(numels), std::move(weights), std::move(masters), std::move(counts),
                                        std::move(averages), std::move(pasts), std::move(states)},
                                       chunk);
             }),
             "rule"_a, py::kw_only(), "device"_a, "weight"_a, "grad"_a, "average"_a, "emas"_a, "numels"_a, "weights"_a,
             "masters"_a, "states"_a, "averages"_a, "pasts"_a, "counts"_a, "chunk"_a = 0)
        .def(
            "configure",
            [](StepPlan& plan, const std::vector<double>& options, int64_t delay, std::vector<double> decays,
               std::vector<double> taps, double update_tap, double fill_ratio, bool ema_of_gradient, uint32_t seed,
               double turn) {
                plan.configure(options, {delay, std::move(decays), std::move(taps), update_tap, fill_ratio,
                                         ema_of_gradient, seed, turn});
            },
            "options"_a, py::kw_only(), "delay"_a, "decays"_a, "taps"_a, "update_tap"_a, "fill_ratio"_a,
            "ema_of_gradient"_a, "seed"_a, "turn"_a = 0.0)
        .def("set_grads",
             [](StepPlan& plan, const std::vector<uint64_t>& grads) {
                 require(grads.size() == plan.grads.size(), "set_grads: one gradient per tensor");
                 for (size_t i = 0; i < grads.size(); ++i) plan.grads[i] = at<const void*>(grads[i]);
             })
        .def(
            "step",
            [](StepPlan& plan, double lr, int64_t t, const std::vector<uint8_t>& first, uint64_t lr_at, uint64_t clock,
               uint64_t grad_scale, uint64_t found_inf, uint64_t stream, int threads) {
                const Moment moment{lr,
                                    at<const float*>(lr_at),
                                    t,
                                    at<int64_t*>(clock),
                                    at<const float*>(grad_scale),
                                    at<const float*>(found_inf)};
                require(first.empty() || first.size() == plan.grads.size(), "step: one `first` per tensor, or none");
                run_step(plan, moment, first, stream, threads);
            },
            "lr"_a, "t"_a, "first"_a, "lr_at"_a, "clock"_a, "grad_scale"_a, "found_inf"_a, "stream"_a, "threads"_a)
        .def("table",
             [](const StepPlan& plan) {
                 const auto bytes = plan.table();
                 return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
             })
        .def("set_table", &StepPlan::set_table)
        .def_property_readonly("numel", &StepPlan::numel)
        .def_property_readonly("chunks", &StepPlan::chunks)
        .def_property_readonly("launches", &StepPlan::launches, "Kernel launches per step; 0 on the CPU.");

    py::class_<Collector>(m, "Collector", "Gathers a step's gradients without a Python loop.")
        .def(py::init<const py::list&, const std::vector<bool>&, const py::dict&, py::tuple, const py::object&>(),
             "params"_a, "moving"_a, "state"_a, "keys"_a, "exchange"_a)
        .def("collect", &Collector::collect, "plan"_a, "params"_a, "state"_a)
        .def(
            "step",
            [](const Collector& c, StepPlan& plan, const py::list& params, const py::dict& state, double lr, int64_t t,
               uint64_t stream, int threads) {
                if (!c.collect(plan, params, state)) return false;
                run_step(plan, {lr, nullptr, t, nullptr, nullptr, nullptr}, {}, stream, threads);
                return true;
            },
            "Collects and steps; false, and nothing is written, where a collection says false.", "plan"_a, "params"_a,
            "state"_a, "lr"_a, "t"_a, "stream"_a, "threads"_a)
        .def(
            "past",
            [](const Collector& c, const StepPlan& plan, size_t i, const py::list& params, const py::dict& state,
               uint64_t out, double velocity_tap, const std::vector<double>& ema_taps, uint64_t stream, int threads) {
                if (!c.holds(i, params, state)) return false;
                run_past(plan, i, out, velocity_tap, ema_taps, stream, threads);
                return true;
            },
            "Past weights of the `i`-th of a group whose parameters all have gradients; false where it has moved.",
            "plan"_a, "i"_a, "params"_a, "state"_a, "out"_a, "velocity_tap"_a, "ema_taps"_a, "stream"_a, "threads"_a);

    m.def(
        "finite",
        [](uint64_t address, int dtype, int64_t numel) {
            bool finite = false;
            run_unlocked(numel > kSmallWork,
                         [&] { finite = all_finite(at<const void*>(address), dtype_of(dtype), numel); });
            return finite;
        },
        "Whether memory on the host holds no NaN and no infinity.", "address"_a, "dtype"_a, "numel"_a);
    m.def("reconstruct", &run_reconstruct, "device"_a, "out"_a, "out_dtype"_a, "weight"_a, "weight_dtype"_a, "numel"_a,
          "terms"_a, "dtypes"_a, "taps"_a, "taps_at"_a, "stream"_a, "threads"_a);
    m.def("ema_update", &run_ema_update, "device"_a, "emas"_a, "dtypes"_a, "update"_a, "update_dtype"_a, "numel"_a,
          "decays"_a, "seed"_a, "turn"_a, "stream"_a, "threads"_a);

    m.attr("CHUNK") = kCpuChunk;
#if defined(LP_CUDA)
    m.attr("CUDA") = true;
#endif
    m.def("build_info", [] {
        py::dict info("version"_a = LP_VERSION, "compiler"_a = __VERSION__,
                      "instruction_set"_a = instruction_set().name);
#if defined(LP_CUDA)
        info["cuda"] = LP_CUDA_VERSION;
        info["cuda_architectures"] = LP_CUDA_ARCHITECTURES;
#else
        info["cuda"] = py::none();
#endif
        return info;
    });
}
