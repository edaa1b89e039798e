#include "routine.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <utility>

#include "run.h"

namespace py = pybind11;

namespace layerpipe {
namespace {

// The group's keys that a step reads and writes, made once.
struct Names {
    PyObject* const params = PyUnicode_InternFromString("params");
    PyObject* const lr = PyUnicode_InternFromString("lr");
    PyObject* const updates = PyUnicode_InternFromString("updates");
    PyObject* const last_lr = PyUnicode_InternFromString("last_lr");
};

const Names& names() {
    static const Names made;
    return made;
}

PyObject* item(const py::dict& dict, PyObject* key) { return PyDict_GetItemWithError(dict.ptr(), key); }

// Numbers that are nothing more: a tensor, a bool or a subclass is for Python to look at.
std::optional<double> exact_float(PyObject* value) {
    if (!value || !PyFloat_CheckExact(value)) return std::nullopt;
    return PyFloat_AS_DOUBLE(value);
}

std::optional<int64_t> exact_int(PyObject* value) {
    if (!value || !PyLong_CheckExact(value)) return std::nullopt;
    return PyLong_AsLongLong(value);
}

}  // namespace

Routine::Routine(py::dict group, py::tuple settings, py::dict state, py::object collector, py::object plan,
                 py::object current, py::object touched, py::object mixture, int64_t delay, double horizon,
                 const py::object& exchange)
    : group_(std::move(group)),
      state_(std::move(state)),
      settings_(std::move(settings)),
      collector_object_(std::move(collector)),
      plan_object_(std::move(plan)),
      current_(std::move(current)),
      touched_(std::move(touched)),
      mixture_(std::move(mixture)),
      collector_(collector_object_.cast<const Collector&>()),
      plan_(plan_object_.cast<StepPlan&>()),
      delay_(delay),
      horizon_(horizon),
      exchange_(exchange_of(exchange)) {
    for (const auto key : settings_) values_.push_back(group_[key]);
}

bool Routine::unchanged() const {
    for (size_t i = 0; i < values_.size(); ++i) {
        PyObject* const value = item(group_, PyTuple_GET_ITEM(settings_.ptr(), i));
        if (value == values_[i].ptr()) continue;
        if (!value) return false;
        const int same = PyObject_RichCompareBool(value, values_[i].ptr(), Py_EQ);
        if (same < 0) PyErr_Clear();  // arrays and the like have no truth value
        if (same != 1) return false;
    }
    return true;
}

bool Routine::fits() const {
    const auto lr = exact_float(item(group_, names().lr));
    return lr && std::isfinite(*lr) && unchanged();
}

bool Routine::ready() {
    const auto list = params();
    return list && fits() && exact_int(item(group_, names().updates)) && collector_.collect(plan_, *list, state_);
}

Target Routine::target() const {
    const py::object found = current_();
    const int device = plan_.arrays().device;
    if (device < 0) return {device, nullptr, found.cast<int>()};
    const auto [stream, threads] = found.cast<std::pair<uint64_t, int>>();
    return {device, at<void*>(stream), threads};
}

std::optional<py::list> Routine::params() const {
    PyObject* const params = item(group_, names().params);
    if (!params || !PyList_CheckExact(params)) return std::nullopt;
    return py::reinterpret_borrow<py::list>(params);
}

void Routine::step() {
    PyObject* const lr_object = item(group_, names().lr);
    const auto lr = exact_float(lr_object);
    const auto updates = exact_int(item(group_, names().updates));
    require(lr && updates, "Routine: a step of a group that is not ready");
    const Moment moment{*lr, nullptr, *updates + 1, nullptr, nullptr, nullptr, horizon_, horizon_, nullptr};
    run_step(plan_, moment, {}, target());
    touched_();
    group_[names().updates] = py::int_(*updates + 1);
    group_[names().last_lr] = py::handle(lr_object);
}

bool Routine::past(size_t i, py::handle out) {
    const auto t = exact_int(item(group_, names().updates));
    const auto lr = exact_float(item(group_, names().last_lr));
    if (!t || !lr || mixture_.is_none() || !unchanged()) return false;
    const bool steady = *t > delay_ && mixed_t_ > delay_;
    if (mixed_lr_ != *lr || (mixed_t_ != *t && !steady)) {
        const py::tuple mixture = mixture_(*t, *lr);
        newest_tap_ = mixture[0].cast<double>();
        ema_taps_ = mixture[1].cast<std::vector<double>>();
        mixed_t_ = *t;
        mixed_lr_ = *lr;
    }
    const auto list = params();
    if (!list || !collector_.holds(plan_, i, *list, state_)) return false;
    const auto there = view(out.ptr(), exchange_);
    require(there && there->dtype == plan_.arrays().weight && there->numel == plan_.record(i).numel &&
                collector_.ordered(i, *there),
            "Routine: past weights go into a tensor like the parameter");
    run_past(plan_, i, const_cast<void*>(there->address), newest_tap_, ema_taps_, target());
    return true;
}

}  // namespace layerpipe
