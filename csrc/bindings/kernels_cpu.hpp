// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The parts of the module _kernels_cpu.
#pragma once

#include <pybind11/pybind11.h>

namespace kvxfer::bindings {

void register_copies(pybind11::module_& m);

}  // namespace kvxfer::bindings
