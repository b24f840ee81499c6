// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The few functions of CUDA's driver API that registering a GPU's memory needs. libcuda is opened
// at run time, and its types are declared here: no header of CUDA is needed to build, and a machine
// without CUDA has a reason instead of an error. Names and numbers are those of CUDA's cuda.h.
#pragma once

#include <cstddef>
#include <string>

namespace kvxfer::cuda_driver {

using Result = int;                  // CUresult
using Device = int;                  // CUdevice: a handle, which is not promised to be the ordinal
using Context = void*;               // CUcontext
using Address = unsigned long long;  // CUdeviceptr

inline constexpr Result kSuccess = 0, kNotInitialized = 3, kNotSupported = 801;

enum PointerAttribute : int {
  kContext = 1,
  kMemoryType = 2,
  kSyncMemops = 6,
  kIsManaged = 8,
  kDeviceOrdinal = 9,
  kIsLegacyIpcCapable = 10,
  kRangeStart = 11,
  kRangeSize = 12,
  kIsRdmaCapable = 15,
};
inline constexpr unsigned kTypeHost = 1, kTypeDevice = 2;            // CUmemorytype
inline constexpr int kWritesOrdering = 118, kDmabufSupported = 124;  // CU_DEVICE_ATTRIBUTE_...
inline constexpr int kOrderedForOwner = 100;  // CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER, and above
inline constexpr int kHandleIsDmabuf = 1;     // CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD

struct Api {
  Result (*init)(unsigned flags);
  Result (*error_name)(Result, const char** name);
  Result (*device_count)(int* count);
  Result (*device)(Device*, int ordinal);
  Result (*device_attribute)(int* value, int attribute, Device);
  Result (*device_name)(char* name, int size, Device);
  Result (*device_bus_id)(char* id, int size, Device);
  Result (*pointer_attributes)(unsigned count, PointerAttribute*, void** values, Address);
  Result (*pointer_attribute)(void* value, PointerAttribute, Address);
  Result (*set_pointer_attribute)(const void* value, PointerAttribute, Address);
  Result (*push_context)(Context);
  Result (*pop_context)(Context*);
  Result (*primary_state)(Device, unsigned* flags, int* active);
  Result (*primary_retain)(Context*, Device);
  Result (*primary_release)(Device);
  // May be null: drivers before CUDA 11.7 do not have it.
  Result (*range_handle)(void* handle, Address, size_t size, int type, unsigned long long flags);
};

// Opens the library named by KVXFER_LIBCUDA, else libcuda.so.1, and calls cuInit, which makes no
// context; once a process, whose answer stays. Null, with the reason, where that fails.
const Api* load_api(std::string& reason);
// After load_api() has succeeded.
const Api& api() noexcept;

// "cuInit failed: CUDA_ERROR_NO_DEVICE (100)".
std::string failure_text(const char* call, Result result);

}  // namespace kvxfer::cuda_driver
