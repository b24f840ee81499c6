// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A GPU's memory, registered with NICs: by a dma-buf that CUDA's driver exports; else by its
// address, which a kernel module (peermem) then makes sense of; else there is a reason for each.
#pragma once

#include <cstdint>
#include <string>

#include "common/fd.hpp"
#include "cuda_driver/memory.hpp"
#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

// One range while it is registered, with as many devices as there are. The dma-buf is closed when
// this goes: what was registered by it stays.
class GpuRange {
 public:
  // Throws where it is not a GPU's memory (any more). `what` names it.
  GpuRange(std::byte* base, uint64_t nbytes, std::string what);
  // Throws RegistrationError with the reason of each way, and what to do.
  Registered register_with(const Device& device, int access) const;

 private:
  Registered by_dmabuf(const Device& device, int access, std::string& why_not) const;
  [[noreturn]] void fail_both(const Device& device, const std::string& no_dmabuf, int err) const;

  std::byte* const base_;
  const uint64_t nbytes_;
  const std::string what_;
  const cuda_driver::Memory memory_;
  uint64_t offset_ = 0;  // of the range in the dma-buf, which has whole pages
  std::string no_export_;
  Fd dmabuf_;
  std::string unordered_;  // why synchronous copies are not held back; or empty
};

}  // namespace kvxfer::verbs
