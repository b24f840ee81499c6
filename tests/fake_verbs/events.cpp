// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "events.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace fake_verbs {

Bell::Bell() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0)
    throw std::system_error(errno, std::generic_category(), "fake_verbs: socketpair");
  read_ = fds[0];
  write_ = fds[1];
}

Bell::~Bell() {
  ::close(read_);
  ::close(write_);
}

void Bell::ring() noexcept {
  const char byte = 0;
  // A full socket has bytes enough.
  (void)!::send(write_, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void Bell::silence() noexcept {
  char bytes[16];
  while (::recv(read_, bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
  }
}

int Bell::wait() const noexcept {
  char byte = 0;
  const ssize_t n = ::read(read_, &byte, 1);  // as the user has set the descriptor
  return n == 1 ? 0 : n == 0 ? EIO : errno;
}

}  // namespace fake_verbs
