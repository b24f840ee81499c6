// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The exception that set-up code throws, and how its message is put together.
#pragma once

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/status.hpp"

namespace kvxfer {

class Error : public std::runtime_error {
 public:
  Error(Code code, std::string message, int err = 0, std::string transport = {},
        std::string peer = {})
      : std::runtime_error(std::move(message)),
        code(code),
        err(err),
        transport(std::move(transport)),
        peer(std::move(peer)) {}
  Code code;
  int err;
  std::string transport, peer;
};

// Concatenation instead of std::format, which needs GCC 13.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

inline std::string errno_text(int err) {
  char buffer[128];
#ifdef __GLIBC__
  return strerror_r(err, buffer, sizeof buffer);  // the GNU variant: thread-safe
#else
  return strerror_r(err, buffer, sizeof buffer) == 0 ? buffer : "unknown error";
#endif
}

template <typename... Parts>
[[noreturn]] void fail(Code code, const Parts&... parts) {
  throw Error(code, cat(parts...));
}

template <typename... Parts>
[[noreturn]] void fail_errno(Code code, int err, const Parts&... parts) {
  throw Error(code, cat(parts..., ": ", errno_text(err)), err);
}

}  // namespace kvxfer
