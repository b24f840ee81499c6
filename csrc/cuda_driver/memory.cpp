// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda_driver/memory.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>

#include "common/error.hpp"

namespace kvxfer::cuda_driver {
namespace {

Address address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Some calls want a current context. The memory's own; or its GPU's primary one if that is active:
// to make one would cost half a gigabyte of the GPU, so where none is the call has to do without.
class Current {
 public:
  explicit Current(const Memory& memory) {
    Context context = memory.context;
    unsigned flags = 0;
    int active = 0;
    if (context == nullptr && api().device(&device_, memory.device) == kSuccess &&
        api().primary_state(device_, &flags, &active) == kSuccess && active != 0)
      retained_ = api().primary_retain(&context, device_) == kSuccess;
    pushed_ = context != nullptr && api().push_context(context) == kSuccess;
  }
  ~Current() {
    Context popped = nullptr;
    if (pushed_) (void)api().pop_context(&popped);
    if (retained_) (void)api().primary_release(device_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  Device device_ = 0;
  bool pushed_ = false, retained_ = false;
};

}  // namespace

Memory look_at(const void* address, uint64_t nbytes, const std::string& what) {
  std::string reason;
  if (load_api(reason) == nullptr)
    fail(Code::kUnavailable, what,
         " is said to be a GPU's memory, but CUDA does not work here: ", reason);
  Memory out;
  unsigned type = 0;
  int is_managed = 0, is_legacy = 0;
  Address start = 0;
  size_t size = 0;
  std::array attributes{kContext,    kMemoryType, kIsManaged, kDeviceOrdinal, kIsLegacyIpcCapable,
                        kRangeStart, kRangeSize};
  std::array<void*, attributes.size()> values{&out.context, &type,  &is_managed, &out.device,
                                              &is_legacy,   &start, &size};
  if (const Result result = api().pointer_attributes(attributes.size(), attributes.data(),
                                                     values.data(), address_of(address));
      result != kSuccess)
    fail(Code::kUnavailable, what, ": ", failure_text("cuPointerGetAttributes", result));
  if (is_managed != 0)
    fail(Code::kInvalidArgument, what,
         " is managed memory, whose pages move between host and GPU, so no NIC can hold them; "
         "allocate it by cudaMalloc");
  if (type != kTypeDevice)
    fail(Code::kInvalidArgument, what, " at ", address, " is ",
         type == kTypeHost ? "pinned host memory: pass it as a host buffer"
                           : "not memory that CUDA knows in this process");
  const Address first = address_of(address);
  if (first < start || nbytes > size || first - start > size - nbytes)
    fail(Code::kInvalidArgument, what, " of ", nbytes, " bytes at ", address,
         " goes beyond its allocation of ", size, " bytes at ", reinterpret_cast<void*>(start));
  out.is_legacy = is_legacy != 0;
  int capable = 0;
  if (api().pointer_attribute(&capable, kIsRdmaCapable, first) == kSuccess)
    out.is_rdma_capable = capable != 0;
  return out;
}

Fd export_dmabuf(const Memory& memory, uintptr_t first, uint64_t nbytes, std::string& reason) {
  const char* const call = "cuMemGetHandleForAddressRange";
  if (api().range_handle == nullptr) {
    reason = cat("this driver has no ", call, ", which came with CUDA 11.7");
    return {};
  }
  const Current current(memory);
  int fd = -1;
  const Result result = api().range_handle(&fd, first, nbytes, kHandleIsDmabuf, 0);
  if (result == kSuccess && fd >= 0) return Fd(fd);
  reason = failure_text(call, result);
  if (result == kNotSupported)
    reason += ", as without NVIDIA's open kernel modules or before Linux 5.12";
  return {};
}

std::string order_copies(const Memory& memory, const void* address) {
  if (!memory.is_legacy) return {};  // the attribute is of such memory alone
  const Current current(memory);
  const int on = 1;
  const Result result = api().set_pointer_attribute(&on, kSyncMemops, address_of(address));
  return result == kSuccess ? "" : failure_text("cuPointerSetAttribute(SYNC_MEMOPS)", result);
}

std::string bus_id(int device) {
  Device handle = 0;
  std::array<char, 32> text{};
  if (api().device(&handle, device) != kSuccess ||
      api().device_bus_id(text.data(), text.size(), handle) != kSuccess)
    return {};
  std::string out(text.data());
  std::ranges::transform(out, out.begin(), [](unsigned char c) { return std::tolower(c); });
  return out;
}

std::vector<Gpu> gpus(std::string& reason) {
  if (load_api(reason) == nullptr) return {};
  int count = 0;
  if (const Result result = api().device_count(&count); result != kSuccess) {
    reason = failure_text("cuDeviceGetCount", result);
    return {};
  }
  if (count == 0) reason = "CUDA shows this process no GPU";
  std::vector<Gpu> out(static_cast<size_t>(std::max(count, 0)));
  for (int i = 0; i < count; ++i) {
    Gpu& gpu = out[static_cast<size_t>(i)];
    Device handle = 0;
    std::array<char, 128> name{};
    int value = 0;
    if (api().device(&handle, i) != kSuccess) continue;
    if (api().device_name(name.data(), name.size(), handle) == kSuccess) gpu.name = name.data();
    gpu.bus_id = bus_id(i);
    gpu.has_dmabuf =
        api().device_attribute(&value, kDmabufSupported, handle) == kSuccess && value != 0;
    gpu.orders_writes = api().device_attribute(&value, kWritesOrdering, handle) == kSuccess &&
                        value >= kOrderedForOwner;
  }
  return out;
}

std::string peermem_module(const std::string& modules) {
  for (const char* name : {"nvidia_peermem", "nv_peer_mem"}) {
    std::error_code none;
    if (std::filesystem::is_directory(modules + "/" + name, none)) return name;
  }
  return {};
}

}  // namespace kvxfer::cuda_driver
