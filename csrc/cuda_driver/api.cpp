// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda_driver/api.hpp"

#include "common/dynamic_library.hpp"
#include "common/error.hpp"

namespace kvxfer::cuda_driver {
namespace {

std::string text_of(const Api& api, const char* call, Result result) {
  const char* name = nullptr;
  if (api.error_name == nullptr || api.error_name(result, &name) != kSuccess || name == nullptr)
    name = "an error without a name";
  return cat(call, " failed: ", name, " (", result, ")",
             result == kNotInitialized
                 ? "; a process that was forked after CUDA was in use cannot use it: start it by "
                   "spawn"
                 : "");
}

struct Loaded {
  Api api{};
  std::string reason;

  Loaded() {
    // Never closed: whoever has made the memory uses it too.
    DynamicLibrary library("KVXFER_LIBCUDA", "libcuda.so.1", "NVIDIA's driver");
    library.find(api.init, "cuInit");
    library.find(api.error_name, "cuGetErrorName");
    library.find(api.device_count, "cuDeviceGetCount");
    library.find(api.device, "cuDeviceGet");
    library.find(api.device_attribute, "cuDeviceGetAttribute");
    library.find(api.device_name, "cuDeviceGetName");
    library.find(api.device_bus_id, "cuDeviceGetPCIBusId");
    library.find(api.pointer_attributes, "cuPointerGetAttributes");
    library.find(api.pointer_attribute, "cuPointerGetAttribute");
    library.find(api.set_pointer_attribute, "cuPointerSetAttribute");
    library.find(api.push_context, "cuCtxPushCurrent_v2");
    library.find(api.pop_context, "cuCtxPopCurrent_v2");
    library.find(api.primary_state, "cuDevicePrimaryCtxGetState");
    library.find(api.primary_retain, "cuDevicePrimaryCtxRetain");
    library.find(api.primary_release, "cuDevicePrimaryCtxRelease_v2");
    library.find(api.range_handle, "cuMemGetHandleForAddressRange", false);
    reason = library.reason();
    if (!reason.empty()) return;
    if (const Result result = api.init(0); result != kSuccess)
      reason = text_of(api, "cuInit", result);
  }
};

const Loaded& loaded() {
  static const Loaded once;
  return once;
}

}  // namespace

const Api* load_api(std::string& reason) {
  const Loaded& library = loaded();
  reason = library.reason;
  return reason.empty() ? &library.api : nullptr;
}

const Api& api() noexcept { return loaded().api; }

std::string failure_text(const char* call, Result result) { return text_of(api(), call, result); }

}  // namespace kvxfer::cuda_driver
