// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// From kvxfer::Error and Failure to the classes of kvxfer.errors.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/error.hpp"

namespace kvxfer::bindings {

void register_errors();
// An exception object with .transport, .peer and .errno set.
pybind11::object make_exception(Code code, const std::string& message, int err,
                                const std::string& transport, const std::string& peer);
[[noreturn]] void raise(const pybind11::object& exception);
[[noreturn]] void raise(Code code, const std::string& message);

}  // namespace kvxfer::bindings
