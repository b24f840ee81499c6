// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How much memory this process may pin, in words that say what to do.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace kvxfer::verbs {

struct Memlock {
  std::optional<uint64_t> limit;   // RLIMIT_MEMLOCK in bytes; none: unlimited
  std::optional<uint64_t> pinned;  // of it are pinned (VmPin); none: the kernel does not say
  bool may_exceed = false;         // CAP_IPC_LOCK
};
Memlock memlock_now();

// Why a registration of `nbytes` that met ENOMEM, EAGAIN or EPERM was refused, as far as that can
// be known: the device says no more than the errno.
std::string explain_memlock(const Memlock& memlock, uint64_t nbytes);

}  // namespace kvxfer::verbs
