// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <poll.h>

#include <functional>

#include "common/clock.hpp"

// Whether `done` came about within so many seconds; looked at every millisecond.
inline bool eventually_within(double seconds, const std::function<bool()>& done) {
  const int64_t until = kvxfer::deadline_after(seconds);
  while (!done()) {
    if (kvxfer::now_ns() > until) return false;
    ::poll(nullptr, 0, 1);
  }
  return true;
}
