// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The one clock: CLOCK_MONOTONIC in nanoseconds. Nobody compares it with another process's.
#pragma once

#include <cstdint>
#include <ctime>
#include <limits>

#include "common/hooks.hpp"

namespace kvxfer {

inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

inline int64_t now_ns() noexcept {
  timespec ts{};
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec + hooks::skipped();
}

// Saturates, so that "one hundred years" and infinity both mean never.
inline int64_t deadline_after(double seconds) noexcept {
  if (!(seconds < 1e9)) return kNever;
  if (seconds <= 0) return now_ns();
  return now_ns() + static_cast<int64_t>(seconds * 1e9);
}

}  // namespace kvxfer
