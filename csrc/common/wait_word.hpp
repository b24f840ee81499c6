// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A futex word to sleep on with a deadline: std::atomic::wait has none, and a condition variable
// would put a lock on the path that ends a transfer.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>

#include "common/clock.hpp"
#include "common/spin.hpp"

namespace kvxfer {

enum class Woken : uint8_t { kNotified, kTimedOut, kInterrupted };

class WaitWord {
 public:
  uint32_t read() const noexcept { return seq_.load(std::memory_order_acquire); }

  // seq_cst against wait()'s store of waiters_: either the notifier sees the waiter, or the waiter
  // (whose kernel-side compare comes later) sees the new number. Releases what the notifier wrote.
  void notify_all() noexcept {
    seq_.fetch_add(1, std::memory_order_seq_cst);
    if (waiters_.load(std::memory_order_seq_cst) == 0) return;
    syscall(SYS_futex, &seq_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    woke_somebody = true;
  }

  // Sleeps until the word differs from `seen`. Take `seen` before looking at the condition.
  Woken wait(uint32_t seen, int64_t deadline_ns) noexcept {
    Woken result = Woken::kNotified;
    waiters_.fetch_add(1, std::memory_order_seq_cst);
    while (seq_.load(std::memory_order_seq_cst) == seen) {
      timespec ts{};
      timespec* until = nullptr;
      if (deadline_ns != kNever) {
        ts.tv_sec = deadline_ns / 1'000'000'000;
        ts.tv_nsec = deadline_ns % 1'000'000'000;
        until = &ts;
      }
      // FUTEX_WAIT_BITSET takes an absolute CLOCK_MONOTONIC time.
      const long rc = syscall(SYS_futex, &seq_, FUTEX_WAIT_BITSET_PRIVATE, seen, until, nullptr,
                              FUTEX_BITSET_MATCH_ANY);
      if (rc == 0 || errno == EAGAIN) continue;
      if (errno == ETIMEDOUT) {
        result = Woken::kTimedOut;
        break;
      }
      if (errno == EINTR) {  // a signal: the binding lets Python run its handlers, then comes back
        result = Woken::kInterrupted;
        break;
      }
    }
    waiters_.fetch_sub(1, std::memory_order_relaxed);
    return result;
  }

 private:
  std::atomic<uint32_t> seq_{0};
  std::atomic<uint32_t> waiters_{0};
};

}  // namespace kvxfer
