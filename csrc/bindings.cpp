// Module layerpipe_kernels._C: raw pointers in, nothing of torch. Checks on tensors are made in Python, where a message
// can name the parameter.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "collect.h"
#include "routine.h"
#include "run.h"

namespace py = pybind11;
using namespace py::literals;
using namespace layerpipe;

namespace {

// An array as Python has it: its address and the number of its dtype.
using Address = std::pair<uint64_t, int>;

Array array_of(const Address& given) { return {at<void*>(given.first), dtype_of(given.second)}; }

// Device, stream and threads.
using Place = std::tuple<int, uint64_t, int>;

Target target_of(const Place& given) { return {std::get<0>(given), at<void*>(std::get<1>(given)), std::get<2>(given)}; }

void reconstruct_call(const Place& place, const Address& out, const Address& weight, int64_t numel,
                      const std::vector<Address>& terms, const std::vector<double>& taps, uint64_t taps_at) {
    const Target target = target_of(place);
    require(terms.size() <= kMaxTerms && taps.size() == (taps_at ? 0 : terms.size()),
            "reconstruct: 0 to 4 terms, one tap each");
    require(!taps_at || target.device >= 0, "reconstruct: taps are numbers on the CPU");
    Reconstruction work{
        array_of(out), array_of(weight), static_cast<int>(terms.size()), {}, {}, at<const float*>(taps_at), numel};
    for (size_t k = 0; k < terms.size(); ++k) work.term[k] = array_of(terms[k]);
    std::copy(taps.begin(), taps.end(), work.tap);
    run_reconstruct(work, target);
}

void ema_update_call(const Place& place, const std::vector<Address>& emas, const Address& update, int64_t numel,
                     const std::vector<double>& decays, uint32_t seed, double turn) {
    require(emas.size() <= kMaxEmas && decays.size() == emas.size(), "ema_update: 0 to 3 EMAs, one decay each");
    require(turn == 0.0 || emas.size() > 1, "ema_update: two averages turn, not fewer");
    Averages work{{}, {}, turn, {}, static_cast<int>(emas.size()), array_of(update), numel};
    for (size_t k = 0; k < emas.size(); ++k) {
        work.ema[k] = array_of(emas[k]);
        work.decay[k] = decays[k];
        work.key[k] = hash32(hash32(seed) + static_cast<uint32_t>(k));
    }
    run_average(work, target_of(place));
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
                         std::vector<uint64_t> pasts, std::vector<uint64_t> counts, std::vector<uint64_t> previous,
                         int64_t chunk) {
                 return StepPlan::make(rule,
                                       {device, dtype_of(weight), dtype_of(grad), dtype_of(average), emas,
                                        std::move(numels), std::move(weights), std::move(masters), std::move(counts),
                                        std::move(averages), std::move(pasts), std::move(previous), std::move(states)},
                                       chunk);
             }),
             "rule"_a, py::kw_only(), "device"_a, "weight"_a, "grad"_a, "average"_a, "emas"_a, "numels"_a, "weights"_a,
             "masters"_a, "states"_a, "averages"_a, "pasts"_a, "counts"_a, "previous"_a, "chunk"_a = 0)
        .def(
            "configure",
            [](StepPlan& plan, const std::vector<double>& options, int64_t delay, std::vector<double> decays,
               std::vector<double> taps, double update_tap, double fill_tap, double fill_ratio, bool ema_of_gradient,
               uint32_t seed, double turn) {
                plan.configure(options, {delay, std::move(decays), std::move(taps), update_tap, fill_tap, fill_ratio,
                                         ema_of_gradient, seed, turn});
            },
            "options"_a, py::kw_only(), "delay"_a, "decays"_a, "taps"_a, "update_tap"_a, "fill_tap"_a, "fill_ratio"_a,
            "ema_of_gradient"_a, "seed"_a, "turn"_a = 0.0)
        .def("set_grads",
             [](StepPlan& plan, const std::vector<uint64_t>& grads) {
                 require(grads.size() == plan.grads.size(), "set_grads: one gradient per tensor");
                 for (size_t i = 0; i < grads.size(); ++i) plan.grads[i] = at<const void*>(grads[i]);
             })
        .def(
            "step",
            [](StepPlan& plan, double lr, int64_t t, const std::vector<uint8_t>& first, uint64_t lr_at, uint64_t clock,
               uint64_t grad_scale, uint64_t found_inf, double horizon, double horizon_before, uint64_t horizon_at,
               const Place& place) {
                const Moment moment{lr,
                                    at<const float*>(lr_at),
                                    t,
                                    at<int64_t*>(clock),
                                    at<const float*>(grad_scale),
                                    at<const float*>(found_inf),
                                    horizon,
                                    horizon_before,
                                    at<float*>(horizon_at)};
                require(first.empty() || first.size() == plan.grads.size(), "step: one `first` per tensor, or none");
                run_step(plan, moment, first, target_of(place));
            },
            "lr"_a, "t"_a, "first"_a, "lr_at"_a, "clock"_a, "grad_scale"_a, "found_inf"_a, "horizon"_a,
            "horizon_before"_a, "horizon_at"_a, "place"_a)
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
        .def("collect", &Collector::collect, "plan"_a, "params"_a, "state"_a);

    py::class_<Routine>(m, "Routine", "The step and past weights of a group in which little is new.")
        .def(py::init<py::dict, py::tuple, py::dict, py::object, py::object, py::object, py::object, py::object,
                      int64_t, double, const py::object&>(),
             "group"_a, "settings"_a, "state"_a, "collector"_a, "plan"_a, "current"_a, "touched"_a, "mixture"_a,
             "delay"_a, "horizon"_a, "exchange"_a)
        .def("fits", &Routine::fits)
        .def("ready", &Routine::ready)
        .def("step", &Routine::step)
        .def("past", &Routine::past, "i"_a, "out"_a);

    m.def(
        "all_finite",
        [](py::handle tensor, const py::object& exchange) -> py::object {
            const auto found = view(tensor.ptr(), exchange_of(exchange));
            if (!found || !found->on_host || !is_dense(*found) || !found->dtype) return py::none();
            bool finite = false;
            run_unlocked(found->numel > kSmallWork,
                         [&] { finite = all_finite(found->address, *found->dtype, found->numel); });
            return py::bool_(finite);
        },
        "Whether a tensor on the host holds no NaN and no infinity; None for one that these kernels do not read.",
        "tensor"_a, "exchange"_a);
    m.def("reconstruct", &reconstruct_call, "place"_a, "out"_a, "weight"_a, "numel"_a, "terms"_a, "taps"_a,
          "taps_at"_a);
    m.def("ema_update", &ema_update_call, "place"_a, "emas"_a, "update"_a, "numel"_a, "decays"_a, "seed"_a, "turn"_a);

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
