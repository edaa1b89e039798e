// A torch tensor seen from C++ without torch's headers: through torch's DLPack functions, or call by call.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>

#include "dlpack.h"
#include "number.h"

namespace layerpipe {

// Owned by torch for as long as the interpreter lives; null for a torch that has none.
using Exchange = const dlpack::DLPackExchangeAPI*;

// Of torch's capsule, or None.
Exchange exchange_of(const pybind11::object& capsule);

// A strided tensor: where it lies, of what, and in which order.
struct View {
    const void* address;
    std::optional<Dtype> dtype;
    bool contiguous;  // dense, and in its natural order
    bool on_host;
    int64_t numel;
    // Where not contiguous: the steps through memory, 0 for a dimension of one element; none for too many dimensions.
    int dims = 0;
    std::array<int64_t, 8> shape{}, strides{};
};

// Whether a tensor has no gaps and no overlaps, its dimensions in any order.
bool is_dense(const View& tensor);

// The order in which a tensor's elements lie in memory: its natural one, or the strides of its dimensions.
class Order {
   public:
    Order() = default;  // the natural one
    explicit Order(const View& tensor);
    bool holds(const View& tensor) const;

   private:
    bool natural_ = true;
    int dims_ = 0;
    std::array<int64_t, 8> strides_{};
};

// Nothing for what has no address, such as a sparse tensor.
std::optional<View> view(PyObject* tensor, Exchange exchange);

pybind11::object attribute(PyObject* object, PyObject* name);

}  // namespace layerpipe
