// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// An owned file descriptor; a forked child does not get it.
#pragma once

#include <unistd.h>

#include <utility>

#include "common/fork.hpp"

namespace kvxfer {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) noexcept : fd_(fd) { own_descriptor(fd); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), birth_(other.birth_) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
      birth_ = other.birth_;
    }
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  void reset() noexcept {
    // In a child the number was closed by the handler, and may be somebody
    // else's by now.
    if (fd_ >= 0 && birth_.here()) {
      disown_descriptor(fd_);  // first: a child must not close a number that was
                               // given out again
      ::close(fd_);
    }
    fd_ = -1;
  }

 private:
  int fd_ = -1;
  Birth birth_;
};

}  // namespace kvxfer
