// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the data path returns instead of throwing: a code and an errno, cheap to copy.
#pragma once

#include <cstdint>
#include <string>

namespace kvxfer {

// One per Python exception class (bindings/errors.hpp maps them); the numbers travel in REFUSE and
// ERROR frames, so they are never renumbered.
enum class Code : uint8_t {
  kOk = 0,
  kAgain = 1,  // a connection has no room: offer it again; never shown to the user
  kInvalidArgument = 2,
  kUnavailable = 3,
  kRegistration = 4,
  kTransport = 5,
  kPeerDisconnected = 6,
  kRemoteAccess = 7,
  kLease = 8,
  kTimeout = 9,
  kCancelled = 10,
  kInternal = 11,
  kBackPressure = 12,  // refused by our own engine at the call: never on a wire
};
inline constexpr uint8_t kMaxCode = 11;  // of those that travel

struct Status {
  Code code = Code::kOk;
  int err = 0;  // errno, 0 when there is none
  bool ok() const noexcept { return code == Code::kOk; }
};

inline constexpr uint64_t kNoSpan = ~uint64_t{0};

// Why a request or a connection failed. Built only on failure, so a string is affordable.
struct Failure {
  Code code = Code::kInternal;
  int err = 0;
  uint64_t span = kNoSpan;  // index of the offending span in the caller's arrays
  uint64_t expected = 0, given = 0;
  std::string text;
};

}  // namespace kvxfer
