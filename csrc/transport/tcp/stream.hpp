// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A connected, non-blocking stream of bytes: a bare socket here, one under TLS in tls.hpp.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <memory>
#include <span>
#include <string>

#include "common/fd.hpp"
#include "common/wire.hpp"

namespace kvxfer::tcp {

class Stream {
 public:
  explicit Stream(Fd fd) noexcept : fd_(std::move(fd)) {}
  virtual ~Stream() = default;
  int fd() const noexcept { return fd_.get(); }
  Fd release() noexcept { return std::move(fd_); }  // for a stream that speaks TLS from here on

  // Like sendmsg and recvmsg: the number of bytes; -1 with errno; receive: 0 is the end. EAGAIN
  // comes only when the socket said so, which is what edge-triggered waiting needs.
  virtual ssize_t send(std::span<const iovec> pieces) noexcept;
  virtual ssize_t receive(std::span<const iovec> pieces) noexcept;
  // Receives up to `nbytes` and forgets them.
  virtual ssize_t drop(size_t nbytes) noexcept;
  // True when all that send() took is with the kernel; false with errno.
  virtual bool flush() noexcept { return true; }

  // Whether one thread may send while another receives. If not, the progress thread does both.
  virtual bool shared() const noexcept { return true; }
  // What only the two ends of this very stream know; bound into the proofs. Empty: nothing.
  virtual ByteView binding() const noexcept { return {}; }
  // The text for an errno that send, receive or flush left.
  virtual std::string explain(int err) const;
  virtual std::string describe() const { return "not encrypted"; }

 protected:
  Fd fd_;
};
using StreamPtr = std::unique_ptr<Stream>;

}  // namespace kvxfer::tcp
