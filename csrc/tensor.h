// A torch tensor seen from C++ without torch's headers: through torch's DLPack functions, or call by call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "dlpack.h"
#include "number.h"

namespace layerpipe {

// Owned by torch for as long as the interpreter lives; null for a torch that has none.
using Exchange = const dlpack::DLPackExchangeAPI*;

// Of torch's capsule, or None.
Exchange exchange_of(const pybind11::object& capsule);

// A dense tensor: where it lies, of what, and whether in its natural order.
struct View {
    const void* address;
    std::optional<Dtype> dtype;
    bool contiguous;
    bool on_host;
    int64_t numel;
};

// Nothing for what has no address, such as a sparse tensor.
std::optional<View> view(PyObject* tensor, Exchange exchange);

pybind11::object attribute(PyObject* object, PyObject* name);

}  // namespace layerpipe
