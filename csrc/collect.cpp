#include "collect.h"

#include <optional>

namespace py = pybind11;

namespace layerpipe {
namespace {

// A dense tensor: where it lies, of what, and whether in its natural order.
struct View {
    const void* address;
    std::optional<Dtype> dtype;
    bool contiguous;
};

std::optional<Dtype> dtype_of(dlpack::DLDataType type) {
    if (type.code == dlpack::kDLBfloat && type.bits == 16) return Dtype::bf16;
    if (type.code != dlpack::kDLFloat) return std::nullopt;
    switch (type.bits) {
        case 16: return Dtype::f16;
        case 32: return Dtype::f32;
        case 64: return Dtype::f64;
        default: return std::nullopt;
    }
}

bool is_contiguous(const dlpack::DLTensor& t) {
    int64_t expected = 1;
    for (int d = t.ndim; d-- > 0;) {
        if (t.shape[d] == 0) return true;
        if (t.shape[d] != 1 && t.strides[d] != expected) return false;
        expected *= t.shape[d];
    }
    return true;
}

py::object call(PyObject* object, PyObject* method) {
    return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, method));
}

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

// Nothing for what has no address, such as a sparse tensor. Without the exchange the same, call by call.
std::optional<View> view(PyObject* tensor, const dlpack::DLPackExchangeAPI* api) {
    if (api) {
        dlpack::DLTensor t{};
        if (api->dltensor_from_py_object_no_sync(tensor, &t) == 0)
            return View{static_cast<const char*>(t.data) + t.byte_offset, dtype_of(t.dtype), is_contiguous(t)};
        PyErr_Clear();
        return std::nullopt;
    }
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
    static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
    static const auto torch = py::module_::import("torch");
    static const py::object names[] = {torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                                       torch.attr("float16")};
    const py::object address = call(tensor, data_ptr), contiguous = call(tensor, is_contiguous);
    if (!address || !contiguous) {
        PyErr_Clear();
        return std::nullopt;
    }
    View v{PyLong_AsVoidPtr(address.ptr()), std::nullopt, contiguous.ptr() == Py_True};
    const py::object dtype = attribute(tensor, dtype_name);
    for (int i = 0; i < 4; ++i)
        if (dtype.is(names[i])) v.dtype = static_cast<Dtype>(i);
    return v;
}

const dlpack::DLPackExchangeAPI* api_of(const py::object& capsule) {
    if (capsule.is_none()) return nullptr;
    auto* api = static_cast<dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->major != 1) api = api->prev_api;
    return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

const void* address_of(PyObject* tensor, const dlpack::DLPackExchangeAPI* api) {
    const auto found = view(tensor, api);
    require(found.has_value(), "Collector: a tensor without an address");
    return found->address;
}

}  // namespace

Collector::Collector(const py::list& params, const std::vector<bool>& moving, const py::dict& state, py::tuple keys,
                     const py::object& exchange)
    : keys_(std::move(keys)), exchange_(exchange) {
    const auto* api = api_of(exchange_);
    require(moving.size() == params.size(), "Collector: one flag per parameter");
    for (size_t i = 0; i < moving.size(); ++i) {
        Entry entry;
        entry.param = {params[i], moving[i] ? address_of(params[i].ptr(), api) : nullptr};
        entry.moving = moving[i];
        entry.hash = PyObject_Hash(params[i].ptr());
        if (moving[i] && !keys_.empty()) {
            entry.state = state[params[i]];
            for (const auto key : keys_) {
                const py::object tensor = entry.state[key];
                entry.tensors.push_back({tensor, address_of(tensor.ptr(), api)});
            }
        }
        entries_.push_back(std::move(entry));
    }
}

bool Collector::collect(StepPlan& plan, const py::list& params, const py::dict& state) const {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    const auto* api = api_of(exchange_);
    const Dtype dtype = plan.arrays().grad;
    if (params.size() != entries_.size()) return false;
    size_t at = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
        const py::object grad = attribute(param, grad_name);
        if (grad.is_none() == entry.moving) return false;
        if (!entry.moving) continue;
        if (!holds(entry, param, state, api)) return false;
        const auto found = view(grad.ptr(), api);
        if (!found || found->dtype != dtype || !found->contiguous) return false;
        plan.grads[at++] = found->address;
    }
    return at == plan.grads.size();
}

bool Collector::holds(const Entry& entry, PyObject* param, const py::dict& state,
                      const dlpack::DLPackExchangeAPI* api) const {
    if (param != entry.param.object.ptr()) return false;
    const auto weight = view(param, api);
    if (!weight || weight->address != entry.param.address || !weight->contiguous) return false;
    if (entry.state && _PyDict_GetItem_KnownHash(state.ptr(), param, entry.hash) != entry.state.ptr()) return false;
    for (size_t k = 0; k < entry.tensors.size(); ++k) {
        const Tensor& tensor = entry.tensors[k];
        if (PyDict_GetItem(entry.state.ptr(), PyTuple_GET_ITEM(keys_.ptr(), k)) != tensor.object.ptr()) return false;
        const auto kept = view(tensor.object.ptr(), api);
        if (!kept || kept->address != tensor.address) return false;
    }
    return true;
}

bool Collector::holds(size_t i, const py::list& params, const py::dict& state) const {
    return params.size() == entries_.size() && i < entries_.size() && entries_[i].moving &&
           holds(entries_[i], PyList_GET_ITEM(params.ptr(), i), state, api_of(exchange_));
}

}  // namespace layerpipe
