// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What one array in host memory is, without a Python attribute: of torch's tensors half a dozen of
// those cost more than to copy 64 KiB.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace kvxfer::bindings {

struct HostArray {
  uintptr_t address;
  uint64_t nbytes;
  uint32_t dtype;  // a number for each library's each dtype
};

// Of a contiguous numpy.ndarray, or of a contiguous object of a class that itself offers DLPack's C
// exchange (torch.Tensor from torch 2.10 on), not of a subclass, which may mean something else.
// None: it is another thing, it may not be written, or there is no cheap way to know.
std::optional<HostArray> host_array(pybind11::handle array, bool written);

}  // namespace kvxfer::bindings
