// Module layerpipe_kernels._C: raw pointers in, nothing of torch. Checks on tensors are made in Python, where a message
// can name the parameter.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/plan.h"

namespace py = pybind11;
using namespace py::literals;
using namespace layerpipe;

namespace {

// Giving up the interpreter lock for a few microseconds of work costs more than it frees.
template <class Work>
void run_unlocked(int64_t numel, const Work& work) {
    std::optional<py::gil_scoped_release> released;
    if (numel > kSmallWork) released.emplace();
    work();
}

template <class T>
void bind_dtype(py::module_& m, const std::string& suffix) {
    py::class_<StepPlan<T>>(m, ("StepPlan_" + suffix).c_str(),
                            "Arrays and chunks of one parameter group; built once, run every step.")
        .def(py::init<std::vector<int64_t>, std::vector<uint64_t>, std::vector<uint64_t>, std::vector<uint64_t>, int,
                      std::vector<uint64_t>>(),
             "numels"_a, "weights"_a, "velocities"_a, "emas"_a, "ema_count"_a, "pasts"_a)
        .def(
            "sgd_step",
            [](StepPlan<T>& plan, const std::vector<uint64_t>& grads, const std::vector<uint8_t>& first, double lr,
               double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
               bool ema_of_gradient, std::vector<double> decays, std::vector<double> taps, double tap_update,
               int threads) {
                const SgdOptions options{lr,       momentum,        dampening,         weight_decay,    nesterov,
                                         maximize, ema_of_gradient, std::move(decays), std::move(taps), tap_update};
                run_unlocked(plan.numel(), [&] { plan.sgd_step(grads, first, options, threads); });
            },
            "grads"_a, "first"_a, py::kw_only(), "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a,
            "maximize"_a, "ema_of_gradient"_a, "decays"_a, "taps"_a, "update_tap"_a, "threads"_a)
        .def_property_readonly("numel", &StepPlan<T>::numel)
        .def_property_readonly("tensors", &StepPlan<T>::tensors)
        .def_property_readonly("chunks", &StepPlan<T>::chunks);

    m.def(("ema_update_" + suffix).c_str(),
          [](const std::vector<uint64_t>& emas, uint64_t update, int64_t numel, const std::vector<double>& decays,
             int threads) {
              if (emas.size() > kMaxEmas || emas.size() != decays.size())
                  throw std::invalid_argument("ema_update: 0 to 3 EMAs, one decay each");
              EmaArrays<T> a{};
              a.emas = static_cast<int>(emas.size());
              a.update = reinterpret_cast<const T*>(update);
              for (int k = 0; k < a.emas; ++k) {
                  a.ema[k] = reinterpret_cast<T*>(emas[k]);
                  a.decay[k] = static_cast<T>(decays[k]);
                  a.one_minus_decay[k] = static_cast<T>(1.0 - decays[k]);
              }
              run_unlocked(numel, [&] { ema_update(a, numel, threads); });
          },
          "emas"_a, "update"_a, "numel"_a, "decays"_a, "threads"_a);

    m.def(("reconstruct_" + suffix).c_str(),
          [](uint64_t out, uint64_t weight, int64_t numel, const std::vector<uint64_t>& terms,
             const std::vector<double>& taps, int threads) {
              if (terms.size() > kMaxTerms || terms.size() != taps.size())
                  throw std::invalid_argument("reconstruct: 0 to 4 terms, one tap each");
              Reconstruction<T> r{};
              r.out = reinterpret_cast<T*>(out);
              r.weight = reinterpret_cast<const T*>(weight);
              r.terms = static_cast<int>(terms.size());
              for (int k = 0; k < r.terms; ++k) {
                  r.term[k] = reinterpret_cast<const T*>(terms[k]);
                  r.tap[k] = static_cast<T>(taps[k]);
              }
              run_unlocked(numel, [&] { reconstruct(r, numel, threads); });
          },
          "out"_a, "weight"_a, "numel"_a, "terms"_a, "taps"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Fused optimizer step, EMA of updates and past-weight reconstruction.";
    bind_dtype<float>(m, "float32");
    bind_dtype<double>(m, "float64");
    m.attr("CHUNK") = kChunk;
    m.def("build_info", [] {
        return py::dict("version"_a = LP_VERSION, "compiler"_a = __VERSION__,
                        "instruction_set"_a = instruction_set().name, "cuda"_a = false);
    });
}
