// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the kernel says of a peer's process on the same host; for messages only.
#pragma once

#include <string>

#include "transport/transport.hpp"

namespace kvxfer {

// "its process 123 is stopped (state T)" when it is a process that we can see and that does not
// run; else empty.
std::string describe_stopped(const HostIdentity& peer, const HostIdentity& self);

}  // namespace kvxfer
