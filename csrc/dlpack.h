// The part of DLPack 1.3 (https://github.com/dmlc/dlpack) through which a tensor's pointer, dtype and strides are had
// in one C call, without torch's headers: torch.Tensor.__dlpack_c_exchange_api__ holds it. The names are DLPack's.
#pragma once

#include <cstdint>

namespace dlpack {

struct DLDevice {
    int32_t device_type, device_id;
};

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;
constexpr int32_t kDLCPU = 1;

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    DLPackExchangeAPI* prev_api;
    void *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync, *managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

}  // namespace dlpack
