#include "collect.h"

namespace py = pybind11;

namespace layerpipe {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

uint64_t address_of(PyObject* tensor) {
    static PyObject* const name = interned("data_ptr");
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!result) throw py::error_already_set();
    return PyLong_AsUnsignedLongLong(result.ptr());
}

// A dense tensor in its natural order. A sparse one raises when asked.
bool is_contiguous(PyObject* tensor) {
    static PyObject* const name = interned("is_contiguous");
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!result) PyErr_Clear();
    return result.ptr() == Py_True;
}

}  // namespace

Collector::Collector(py::list params, std::vector<bool> moving, py::dict state, py::tuple keys, py::object dtype)
    : keys_(std::move(keys)), dtype_(std::move(dtype)) {
    require(moving.size() == params.size(), "Collector: one flag per parameter");
    for (size_t i = 0; i < moving.size(); ++i) {
        Entry entry;
        entry.param = {params[i], moving[i] ? address_of(params[i].ptr()) : 0};
        entry.moving = moving[i];
        entry.hash = PyObject_Hash(params[i].ptr());
        if (moving[i] && !keys_.empty()) {
            entry.state = state[params[i]];
            for (const auto key : keys_) {
                const py::object tensor = entry.state[key];
                entry.tensors.push_back({tensor, address_of(tensor.ptr())});
            }
        }
        entries_.push_back(std::move(entry));
    }
}

bool Collector::collect(StepPlan& plan, const py::list& params, const py::dict& state) const {
    static PyObject* const grad_name = interned("grad");
    static PyObject* const dtype_name = interned("dtype");
    if (params.size() != entries_.size()) return false;
    size_t at = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
        if (param != entry.param.object.ptr()) return false;
        const py::object grad = attribute(param, grad_name);
        if (grad.is_none() == entry.moving) return false;
        if (!entry.moving) continue;
        if (address_of(param) != entry.param.address) return false;
        if (entry.state && _PyDict_GetItem_KnownHash(state.ptr(), param, entry.hash) != entry.state.ptr()) return false;
        for (size_t k = 0; k < entry.tensors.size(); ++k) {
            const Tensor& tensor = entry.tensors[k];
            if (PyDict_GetItem(entry.state.ptr(), PyTuple_GET_ITEM(keys_.ptr(), k)) != tensor.object.ptr() ||
                address_of(tensor.object.ptr()) != tensor.address)
                return false;
        }
        if (!attribute(grad.ptr(), dtype_name).is(dtype_) || !is_contiguous(grad.ptr())) return false;
        plan.grads[at++] = reinterpret_cast<const void*>(address_of(grad.ptr()));
    }
    return at == plan.grads.size();
}

}  // namespace layerpipe
