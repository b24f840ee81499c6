// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What CUDA's driver tells about a GPU's memory, and the dma-buf that a NIC can map it by. Nothing
// here reads or writes that memory, and no context comes to be.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/fd.hpp"
#include "cuda_driver/api.hpp"

namespace kvxfer::cuda_driver {

struct Memory {
  int device = 0;  // ordinal, among those that CUDA shows this process
  // Of cuMemAlloc (cudaMalloc). False: mapped by cuMemMap, as by expandable segments, or of a pool.
  bool is_legacy = false;
  // Whether GPUDirect RDMA may use it, as it was allocated; none: the driver does not say.
  std::optional<bool> is_rdma_capable;
  Context context = nullptr;  // that it belongs to; null: to none, as what is mapped by cuMemMap
};

// Throws UnavailableError without CUDA, InvalidArgumentError where [address, address + nbytes) is
// not a GPU's memory or goes beyond one allocation. `what` names it.
Memory look_at(const void* address, uint64_t nbytes, const std::string& what);

// A dma-buf of exactly [first, first + nbytes), whole pages of the host. Empty, with the reason,
// where there is none.
Fd export_dmabuf(const Memory& memory, uintptr_t first, uint64_t nbytes, std::string& reason);

// From now on a synchronous copy by CUDA to or from this allocation has ended when its call
// returns, also where CUDA would return earlier: a NIC that is told of the bytes then finds them.
// Empty; or why not.
std::string order_copies(const Memory& memory, const void* address);

// "0000:3b:00.0", as sysfs writes it; empty where the driver does not say.
std::string bus_id(int device);

struct Gpu {
  std::string name, bus_id;
  bool has_dmabuf = false;  // the driver exports them
  // Kernels that are launched after a NIC's write has completed find it, without a flush.
  bool orders_writes = false;
};
// Empty, with the reason, where CUDA shows none.
std::vector<Gpu> gpus(std::string& reason);

// The kernel module that lets a NIC register a GPU's memory by its address; empty: none is loaded.
std::string peermem_module(const std::string& modules = "/sys/module");

}  // namespace kvxfer::cuda_driver
