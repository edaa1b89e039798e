#include "tensor.h"

namespace py = pybind11;

namespace layerpipe {
namespace {

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

std::optional<View> view_by_calls(PyObject* tensor) {
    static const auto torch = py::module_::import("torch");
    static const py::object names[] = {torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                                       torch.attr("float16")};
    const py::handle t(tensor);
    try {
        View v{PyLong_AsVoidPtr(t.attr("data_ptr")().ptr()),
               std::nullopt,
               t.attr("is_contiguous")().cast<bool>(),
               t.attr("is_cpu").cast<bool>(),
               t.attr("numel")().cast<int64_t>(),
               nullptr,
               nullptr,
               0};
        const py::object dtype = t.attr("dtype");
        for (int i = 0; i < 4; ++i)
            if (dtype.is(names[i])) v.dtype = static_cast<Dtype>(i);
        return v;
    } catch (const py::error_already_set&) {
        return std::nullopt;
    }
}

}  // namespace

Exchange exchange_of(const py::object& capsule) {
    if (capsule.is_none()) return nullptr;
    auto* api = static_cast<dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->major != 1) api = api->prev_api;
    return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

std::optional<View> view(PyObject* tensor, Exchange exchange) {
    if (!exchange) return view_by_calls(tensor);
    dlpack::DLTensor t{};
    if (exchange->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
        PyErr_Clear();
        return std::nullopt;
    }
    int64_t numel = 1;
    for (int d = 0; d < t.ndim; ++d) numel *= t.shape[d];
    return View{static_cast<const char*>(t.data) + t.byte_offset,
                dtype_of(t.dtype),
                is_contiguous(t),
                t.device.device_type == dlpack::kDLCPU,
                numel,
                t.shape,
                t.strides,
                t.ndim};
}

Order::Order(const View& tensor) : natural_(tensor.contiguous) {
    if (natural_ || !tensor.strides) return;
    for (int d = 0; d < tensor.dims; ++d) strides_.push_back(tensor.shape[d] == 1 ? 0 : tensor.strides[d]);
}

bool Order::holds(const View& tensor) const {
    if (natural_) return tensor.contiguous;
    // Of a torch without DLPack's functions, nothing is known but that it is another order.
    if (strides_.empty() || tensor.dims != static_cast<int>(strides_.size())) return false;
    for (int d = 0; d < tensor.dims; ++d)
        if (tensor.shape[d] != 1 && tensor.strides[d] != strides_[d]) return false;
    return true;
}

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

}  // namespace layerpipe
