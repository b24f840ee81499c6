// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/gpu_memory.hpp"

#include <unistd.h>

#include <cerrno>
#include <utility>

#include "common/error.hpp"
#include "transport/region.hpp"
#include "transport/verbs/memlock.hpp"

namespace kvxfer::verbs {

GpuRange::GpuRange(std::byte* base, uint64_t nbytes, std::string what)
    : base_(base),
      nbytes_(nbytes),
      what_(std::move(what)),
      memory_(cuda_driver::look_at(base, nbytes, what_)) {
  // Whole pages are exported; the NIC is given the bytes between.
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(base);
  const uintptr_t first = begin / page * page;
  const uintptr_t end = (begin + nbytes + page - 1) / page * page;
  offset_ = begin - first;
  dmabuf_ = cuda_driver::export_dmabuf(memory_, first, end - first, no_export_);
  unordered_ = cuda_driver::order_copies(memory_, base);
}

Registered GpuRange::by_dmabuf(const Device& device, int access, std::string& why_not) const {
  if (!dmabuf_) {
    why_not = no_export_;
    return {};
  }
  if (api().reg_dmabuf_mr == nullptr) {
    why_not = "this libibverbs has no ibv_reg_dmabuf_mr, which came with rdma-core 34";
    return {};
  }
  // Not every device binds windows to such memory; then its writes are pulled.
  for (const int allowed : {access, access & ~IBV_ACCESS_MW_BIND}) {
    MrPtr mr(api().reg_dmabuf_mr(device.pd(), offset_, nbytes_, reinterpret_cast<uint64_t>(base_),
                                 dmabuf_.get(), allowed));
    if (mr) return {std::move(mr), allowed == access, "by dma-buf"};
    const int err = errno;
    why_not = cat("ibv_reg_dmabuf_mr(offset ", offset_, ", access ", allowed,
                  ") failed: ", errno_text(err));
    if (err == ENOMEM || err == EPERM || err == EAGAIN)
      why_not += "; " + explain_memlock(memlock_now(), nbytes_);
    if (allowed == (access & ~IBV_ACCESS_MW_BIND)) break;
  }
  return {};
}

Registered GpuRange::register_with(const Device& device, int access) const {
  const std::string note =
      unordered_.empty()
          ? ""
          : cat(" (synchronous copies by CUDA may end after their call: ", unordered_, ")");
  std::string no_dmabuf;
  if (Registered out = by_dmabuf(device, access, no_dmabuf); out.mr) {
    out.how += note;
    return out;
  }
  MrPtr mr(api().reg_mr(device.pd(), base_, nbytes_, access));
  if (!mr) fail_both(device, no_dmabuf, errno);
  const std::string module = cuda_driver::peermem_module();
  return {std::move(mr), true,
          cat("by its address (peermem", module.empty() ? "" : ": " + module,
              "), not by dma-buf: ", no_dmabuf, note)};
}

void GpuRange::fail_both(const Device& device, const std::string& no_dmabuf, int err) const {
  const std::string module = cuda_driver::peermem_module();
  std::string text =
      cat(what_, ", ", nbytes_, " bytes at ", static_cast<const void*>(base_), ", memory of ",
          device_text(memory_.device), ", cannot be registered with ", device.name(),
          ". By dma-buf: ", no_dmabuf, ". By its address: ibv_reg_mr failed: ", errno_text(err));
  text += module.empty() ? "; no peermem module is loaded (`modprobe nvidia_peermem`)"
                         : cat("; ", module, " is loaded, but does not take it");
  if (err == ENOMEM || err == EPERM || err == EAGAIN)
    text += "; " + explain_memlock(memlock_now(), nbytes_);
  if (!memory_.is_legacy)
    text +=
        ". It was not allocated by cudaMalloc, but is mapped (expandable segments) or of a pool, "
        "which such modules do not take: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False";
  if (memory_.is_rdma_capable == false)
    text +=
        ". The driver says that it was allocated without GPUDirect RDMA "
        "(CUmemAllocationProp::gpuDirectRDMACapable), or that this GPU has none";
  throw Error(Code::kRegistration, text, err, "verbs");
}

}  // namespace kvxfer::verbs
