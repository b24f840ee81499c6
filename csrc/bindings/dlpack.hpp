// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The ABI of DLPack, versions 0.x and 1.x: the few structs that a consumer needs.
#pragma once

#include <cstdint>

namespace kvxfer::bindings {

inline constexpr int32_t kDlCpu = 1;

struct DlDevice {
  int32_t device_type, device_id;
};
struct DlDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* manager;
  void (*deleter)(DlManagedTensor*);
};
struct DlManagedTensorVersioned {
  uint32_t major, minor;
  void* manager;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
inline constexpr uint64_t kDlReadOnly = 1;

// DLPack 1.3's table of C functions, as far as it is used. Fills in a view that lives as long as
// the object is held; -1: a Python exception is set.
using DlTensorFromObject = int (*)(void* object, DlTensor* out);
struct DlExchangeApi {
  uint32_t major, minor;
  DlExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  DlTensorFromObject dltensor_from_object;
};

}  // namespace kvxfer::bindings
