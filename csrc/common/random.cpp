// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "common/random.hpp"

#include <sys/random.h>

#include <cerrno>

#include "common/error.hpp"

namespace kvxfer {

void fill_random(std::span<std::byte> out) {
  while (!out.empty()) {
    const ssize_t n = ::getrandom(out.data(), out.size(), 0);
    if (n < 0) {
      if (errno == EINTR) continue;
      fail_errno(Code::kInternal, errno, "getrandom(", out.size(), ") failed");
    }
    out = out.subspan(static_cast<size_t>(n));
  }
}

}  // namespace kvxfer
