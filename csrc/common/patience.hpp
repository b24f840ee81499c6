// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How long a call that sets something up may block: until its deadline, or until nobody wants it
// any more (Ctrl-C, close()), which it looks for while it waits.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "common/wait_word.hpp"

namespace kvxfer {

class Patience {
 public:
  // `unwanted` is asked about every 50 ms, on the waiting thread.
  explicit Patience(int64_t deadline_ns, std::function<bool()> unwanted = {})
      : deadline_ns_(deadline_ns), unwanted_(std::move(unwanted)) {}

  int64_t deadline_ns() const noexcept { return deadline_ns_; }
  Patience until(int64_t deadline_ns) const {
    return Patience(std::min(deadline_ns, deadline_ns_), unwanted_);
  }

  // Throws kCancelled when nobody wants it any more.
  void look() const {
    if (unwanted_ && unwanted_()) fail(Code::kCancelled, "given up by who asked for it");
  }

  // False at the deadline; else the word may have changed.
  bool wait(WaitWord& word, uint32_t seen) const {
    look();
    const int64_t until_ns = next_look_ns();
    return word.wait(seen, until_ns) != Woken::kTimedOut || until_ns != deadline_ns_;
  }

  // False at the deadline; true: the descriptor is ready.
  bool wait(int fd, short events) const {
    for (;;) {
      look();
      const int64_t left_ns = next_look_ns() - now_ns();
      if (left_ns <= 0) return false;
      pollfd entry{fd, events, 0};
      const int n = ::poll(&entry, 1, static_cast<int>(left_ns / 1'000'000 + 1));
      if (n > 0) return true;
      if (n < 0 && errno != EINTR) fail_errno(Code::kInternal, errno, "poll failed");
    }
  }

 private:
  static constexpr int64_t kLookNs = 50'000'000;
  int64_t next_look_ns() const noexcept { return std::min(deadline_ns_, now_ns() + kLookNs); }

  const int64_t deadline_ns_;
  const std::function<bool()> unwanted_;
};

}  // namespace kvxfer
