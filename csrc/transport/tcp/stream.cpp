// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/stream.hpp"

#include <sys/socket.h>

#include "common/error.hpp"

namespace kvxfer::tcp {
namespace {

msghdr message_of(std::span<const iovec> pieces) noexcept {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(pieces.data());
  message.msg_iovlen = pieces.size();
  return message;
}

}  // namespace

ssize_t Stream::send(std::span<const iovec> pieces) noexcept {
  const msghdr message = message_of(pieces);
  return ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t Stream::receive(std::span<const iovec> pieces) noexcept {
  msghdr message = message_of(pieces);
  return ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
}

ssize_t Stream::drop(size_t nbytes) noexcept {
  // MSG_TRUNC on a TCP socket drops the bytes in the kernel, uncopied.
  return ::recv(fd_.get(), nullptr, nbytes, MSG_DONTWAIT | MSG_TRUNC);
}

std::string Stream::explain(int err) const { return errno_text(err); }

}  // namespace kvxfer::tcp
