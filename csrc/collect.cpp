#include "collect.h"

namespace py = pybind11;

namespace layerpipe {
namespace {

View seen(PyObject* tensor, Exchange exchange) {
    const auto found = view(tensor, exchange);
    require(found.has_value(), "Collector: a tensor without an address");
    return *found;
}

// Whether torch reads the tensor with the other sign: the imaginary part of a conjugate. With more than one element
// such a tensor is not dense.
bool negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* const found = PyObject_CallMethodNoArgs(tensor, name);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found).is(py::bool_(true));
}

}  // namespace

Collector::Collector(const py::list& params, const std::vector<bool>& moving, const py::dict& state, py::tuple keys,
                     const py::object& exchange)
    : keys_(std::move(keys)), exchange_(exchange_of(exchange)) {
    require(moving.size() == params.size(), "Collector: one flag per parameter");
    for (size_t i = 0; i < moving.size(); ++i) {
        Entry entry;
        entry.param = {params[i], nullptr};
        if (moving[i]) {
            const View weight = seen(params[i].ptr(), exchange_);
            entry.param.address = weight.address;
            entry.order = Order(weight);
        }
        entry.moving = moving[i];
        entry.hash = PyObject_Hash(params[i].ptr());
        if (moving[i] && !keys_.empty()) {
            entry.state = state[params[i]];
            for (const auto key : keys_) {
                const py::object tensor = entry.state[key];
                entry.tensors.push_back({tensor, seen(tensor.ptr(), exchange_).address});
            }
        }
        entries_.push_back(std::move(entry));
    }
}

bool Collector::collect(StepPlan& plan, const py::list& params, const py::dict& state) const {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    const Dtype dtype = plan.arrays().grad;
    if (params.size() != entries_.size()) return false;
    size_t at = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
        if (param != entry.param.object.ptr()) return false;
        const py::object grad = attribute(param, grad_name);
        if (grad.is_none() == entry.moving) return false;
        if (!entry.moving) continue;
        const int64_t numel = plan.record(at).numel;
        if (!holds(entry, param, plan.arrays().weight, numel, state)) return false;
        const auto found = view(grad.ptr(), exchange_);
        if (!found || found->dtype != dtype || found->numel != numel || !entry.order.holds(*found)) return false;
        if (numel && !found->address) return false;
        if (numel == 1 && negated(grad.ptr())) return false;
        plan.grads[at++] = found->address;
    }
    return at == plan.grads.size();
}

bool Collector::holds(const Entry& entry, PyObject* param, Dtype dtype, int64_t numel, const py::dict& state) const {
    if (param != entry.param.object.ptr()) return false;
    const auto weight = view(param, exchange_);
    if (!weight || weight->address != entry.param.address || !entry.order.holds(*weight)) return false;
    if (weight->dtype != dtype || weight->numel != numel) return false;
    if (entry.state && _PyDict_GetItem_KnownHash(state.ptr(), param, entry.hash) != entry.state.ptr()) return false;
    for (size_t k = 0; k < entry.tensors.size(); ++k) {
        const Tensor& tensor = entry.tensors[k];
        if (PyDict_GetItem(entry.state.ptr(), PyTuple_GET_ITEM(keys_.ptr(), k)) != tensor.object.ptr()) return false;
        const auto kept = view(tensor.object.ptr(), exchange_);
        if (!kept || kept->address != tensor.address) return false;
    }
    return true;
}

bool Collector::holds(const StepPlan& plan, size_t i, const py::list& params, const py::dict& state) const {
    return params.size() == entries_.size() && i < entries_.size() && entries_[i].moving &&
           holds(entries_[i], PyList_GET_ITEM(params.ptr(), i), plan.arrays().weight, plan.record(i).numel, state);
}

}  // namespace layerpipe
