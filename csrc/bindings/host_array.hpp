// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What one array in host memory is. Of torch's tensors it is asked by DLPack's C functions where
// they are: half a dozen attributes cost as much as to copy 64 KiB.
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

// Of a contiguous numpy.ndarray or torch.Tensor, not of a subclass, which may mean something else.
// None: it is another thing, it may not be written, or a gradient is wanted.
std::optional<HostArray> host_array(pybind11::handle array, bool written);

// (bytes, addresses): all but the addresses that there is to know about host tensors, none of which
// wants a gradient. None: one is another thing. NotImplemented: this torch must be asked in Python.
pybind11::object tensor_facts(const pybind11::tuple& tensors);

}  // namespace kvxfer::bindings
