// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A queue of events behind a file descriptor that can be polled, made non-blocking and read from
// by somebody who sleeps: what a completion channel and a context's async_fd are.
//
// The descriptor is readable while the queue has events. Events of an object that is destroyed can
// be taken back, as the kernel does, which bytes in a pipe could not.
#pragma once

#include <deque>
#include <mutex>
#include <optional>

namespace fake_verbs {

// A pair of connected sockets; a byte lies in it while there are events.
class Bell {
 public:
  Bell();  // throws std::system_error
  ~Bell();
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  int fd() const noexcept { return read_; }
  void ring() noexcept;
  void silence() noexcept;
  // Waits for a byte and takes it; 0, or the errno of the wait (EAGAIN when fd() is non-blocking).
  int wait() const noexcept;

 private:
  int read_ = -1, write_ = -1;
};

// push() and remove_if() under the lock that is given to pop().
template <typename Event>
class EventQueue {
 public:
  int fd() const noexcept { return bell_.fd(); }

  void push(const Event& event) {
    events_.push_back(event);
    update();
  }
  template <typename Predicate>
  void remove_if(Predicate which) {
    std::erase_if(events_, which);
    update();
  }
  // Called without the lock; `taken(event)` runs under it. 0 or an errno.
  template <typename Lock, typename Taken>
  int pop(Lock make_lock, Event& out, Taken taken) {
    for (;;) {
      if (const int err = bell_.wait()) return err;
      const auto lock = make_lock();
      rung_ = false;
      if (events_.empty()) continue;  // taken back meanwhile
      out = events_.front();
      events_.pop_front();
      update();
      taken(out);
      return 0;
    }
  }

 private:
  void update() {
    if (events_.empty()) {
      bell_.silence();
      rung_ = false;
    } else if (!rung_) {
      bell_.ring();
      rung_ = true;
    }
  }
  Bell bell_;
  bool rung_ = false;
  std::deque<Event> events_;
};

}  // namespace fake_verbs
