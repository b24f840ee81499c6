// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda_driver/api.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <type_traits>

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
    const char* name = std::getenv("KVXFER_LIBCUDA");
    if (name == nullptr || *name == '\0') name = "libcuda.so.1";
    // Never closed: whoever has made the memory uses it too.
    void* library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = ::dlerror();
      reason = cat(name, " cannot be opened: ", why != nullptr ? why : "no reason given",
                   "; it comes with NVIDIA's driver");
      return;
    }
    const auto find = [&](auto& function, const char* symbol, bool needed = true) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, symbol));
      if (function == nullptr && needed && reason.empty())
        reason = cat(name, " has no ", symbol, ": it is too old, or another library");
    };
    find(api.init, "cuInit");
    find(api.error_name, "cuGetErrorName");
    find(api.device_count, "cuDeviceGetCount");
    find(api.device, "cuDeviceGet");
    find(api.device_attribute, "cuDeviceGetAttribute");
    find(api.device_name, "cuDeviceGetName");
    find(api.device_bus_id, "cuDeviceGetPCIBusId");
    find(api.pointer_attributes, "cuPointerGetAttributes");
    find(api.pointer_attribute, "cuPointerGetAttribute");
    find(api.set_pointer_attribute, "cuPointerSetAttribute");
    find(api.push_context, "cuCtxPushCurrent_v2");
    find(api.pop_context, "cuCtxPopCurrent_v2");
    find(api.primary_state, "cuDevicePrimaryCtxGetState");
    find(api.primary_retain, "cuDevicePrimaryCtxRetain");
    find(api.primary_release, "cuDevicePrimaryCtxRelease_v2");
    find(api.range_handle, "cuMemGetHandleForAddressRange", false);
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
