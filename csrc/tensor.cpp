#include "tensor.h"

#include <pybind11/stl.h>

#include <vector>

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

// The strides, where a view needs them. Of more dimensions than there is room for, nothing is known.
template <class Shape, class Strides>
void set_strides(View& v, int dims, const Shape& shape, const Strides& strides) {
    if (v.contiguous || dims > static_cast<int>(v.shape.size())) return;
    v.dims = dims;
    for (int d = 0; d < dims; ++d) {
        v.shape[d] = shape[d];
        v.strides[d] = v.shape[d] == 1 ? 0 : static_cast<int64_t>(strides[d]);
    }
}

std::optional<View> view_by_calls(PyObject* tensor) {
    static const auto torch = py::module_::import("torch");
    static const py::object names[] = {torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                                       torch.attr("float16")};
    const py::handle t(tensor);
    try {
        View v{PyLong_AsVoidPtr(t.attr("data_ptr")().ptr()), std::nullopt, t.attr("is_contiguous")().cast<bool>(),
               t.attr("is_cpu").cast<bool>(), t.attr("numel")().cast<int64_t>()};
        const py::object dtype = t.attr("dtype");
        for (int i = 0; i < 4; ++i)
            if (dtype.is(names[i])) v.dtype = static_cast<Dtype>(i);
        if (!v.contiguous) {
            const auto shape = t.attr("shape").cast<std::vector<int64_t>>();
            set_strides(v, static_cast<int>(shape.size()), shape, t.attr("stride")().cast<std::vector<int64_t>>());
        }
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
    View v{static_cast<const char*>(t.data) + t.byte_offset, dtype_of(t.dtype), is_contiguous(t),
           t.device.device_type == dlpack::kDLCPU, numel};
    set_strides(v, t.ndim, t.shape, t.strides);
    return v;
}

bool is_dense(const View& tensor) {
    if (tensor.contiguous) return true;
    int left = 0;
    for (int d = 0; d < tensor.dims; ++d) left += tensor.shape[d] != 1;
    if (left == 0) return false;
    // From the smallest step through memory to the largest, each as large as all smaller dimensions together.
    for (int64_t expected = 1; left > 0; --left) {
        int next = 0;
        while (next < tensor.dims && (tensor.shape[next] == 1 || tensor.strides[next] != expected)) ++next;
        if (next == tensor.dims) return false;
        expected *= tensor.shape[next];
    }
    return true;
}

Order::Order(const View& tensor) : natural_(tensor.contiguous), dims_(tensor.dims), strides_(tensor.strides) {}

bool Order::holds(const View& tensor) const {
    if (natural_) return tensor.contiguous;
    return dims_ > 0 && tensor.dims == dims_ && tensor.strides == strides_;
}

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

}  // namespace layerpipe
