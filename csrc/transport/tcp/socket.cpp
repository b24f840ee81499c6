// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/socket.hpp"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>

#include "common/clock.hpp"
#include "common/error.hpp"

namespace kvxfer::tcp {
namespace {

[[noreturn]] void fail_broken(Stream& stream, int err) {
  throw Error(Code::kPeerDisconnected,
              cat("the connection broke during the handshake: ", stream.explain(err),
                  "; if the peer's process has just ended, connect() to its successor"),
              err);
}

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressList resolve(const std::string& address, bool passive) {
  const HostPort parsed = parse_address(address);
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* list = nullptr;
  const int rc = ::getaddrinfo(parsed.host.empty() ? nullptr : parsed.host.c_str(),
                               std::to_string(parsed.port).c_str(), &hints, &list);
  if (rc != 0)
    fail(Code::kInvalidArgument, "cannot resolve address '", address, "': ", gai_strerror(rc),
         "; expected \"host:port\", for IPv6 \"[::1]:port\"");
  return {list, &freeaddrinfo};
}

std::string format(const sockaddr_storage& storage) {
  char text[INET6_ADDRSTRLEN] = {};
  if (storage.ss_family == AF_INET6) {
    const auto& in = reinterpret_cast<const sockaddr_in6&>(storage);
    ::inet_ntop(AF_INET6, &in.sin6_addr, text, sizeof text);
    return cat("[", text, "]:", ntohs(in.sin6_port));
  }
  const auto& in = reinterpret_cast<const sockaddr_in&>(storage);
  ::inet_ntop(AF_INET, &in.sin_addr, text, sizeof text);
  return cat(text, ":", ntohs(in.sin_port));
}

bool is_loopback(const sockaddr_storage& storage) {
  if (storage.ss_family == AF_INET6)
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr);
  const auto& in = reinterpret_cast<const sockaddr_in&>(storage);
  return (ntohl(in.sin_addr.s_addr) >> 24) == 127;
}

}  // namespace

HostPort parse_address(const std::string& address) {
  if (!is_printable(address))
    fail(Code::kInvalidArgument,
         "the address has a control character; expected \"host:port\", for IPv6 \"[::1]:port\"");
  const size_t colon = address.rfind(':');
  HostPort out;
  bool ok = colon != std::string::npos;
  if (ok) {
    out.host = address.substr(0, colon);
    if (out.host.size() >= 2 && out.host.front() == '[' && out.host.back() == ']')
      out.host = out.host.substr(1, out.host.size() - 2);
    else
      ok = out.host.find(':') == std::string::npos;  // an IPv6 address needs its brackets
    const char *first = address.data() + colon + 1, *last = address.data() + address.size();
    const auto [end, error] = std::from_chars(first, last, out.port);
    ok = ok && error == std::errc{} && end == last && first != last;
  }
  if (!ok)
    fail(Code::kInvalidArgument, "address '", address,
         "' is not \"host:port\" with a port from 0 to 65535; IPv6 is written \"[::1]:port\"");
  return out;
}

void set_options(int fd, bool bulk) noexcept {
  // None of these can make a connection wrong, only slower or later to notice a dead host.
  auto set = [fd](int level, int name, int value) {
    ::setsockopt(fd, level, name, &value, sizeof value);
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 5);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
  // A short unsent queue keeps the choice of what to send next with us, not with the kernel.
  if (bulk) set(IPPROTO_TCP, TCP_NOTSENT_LOWAT, 256 * 1024);
}

Listener listen(const std::string& address) {
  AddressList list = resolve(address, true);
  int err = 0;
  for (const addrinfo* ai = list.get(); ai != nullptr; ai = ai->ai_next) {
    Fd fd(::socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int one = 1;
    if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (!fd || ::bind(fd.get(), ai->ai_addr, ai->ai_addrlen) != 0 ||
        ::listen(fd.get(), SOMAXCONN) != 0) {
      err = errno;
      continue;
    }
    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &size) != 0)
      fail_errno(Code::kInternal, errno, "getsockname failed");
    Listener out;
    out.loopback = is_loopback(bound);
    out.address = format(bound);
    out.fd = std::move(fd);
    return out;
  }
  fail_errno(Code::kUnavailable, err, "cannot listen on '", address,
             "'; port 0 lets the system choose a free one");
}

Fd connect(const std::string& address, const Patience& patience, bool bulk) {
  AddressList list = resolve(address, false);
  int err = 0;
  for (const addrinfo* ai = list.get(); ai != nullptr; ai = ai->ai_next) {
    Fd fd(::socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd) {
      err = errno;
      continue;
    }
    set_options(fd.get(), bulk);
    if (::connect(fd.get(), ai->ai_addr, ai->ai_addrlen) != 0) {
      if (errno != EINPROGRESS && errno != EINTR) {
        err = errno;
        continue;
      }
      if (!patience.wait(fd.get(), POLLOUT))
        throw Error(Code::kTimeout, cat("connecting to ", address, " timed out"), ETIMEDOUT, "tcp",
                    address);
      socklen_t size = sizeof err;
      ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &err, &size);
      if (err != 0) continue;
    }
    return fd;
  }
  throw Error(
      Code::kTransport,
      cat("cannot connect to ", address, ": ", errno_text(err), "; is an engine listening there?"),
      err, "tcp", address);
}

std::string peer_address(int fd) {
  sockaddr_storage storage{};
  socklen_t size = sizeof storage;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0) return "unknown";
  return format(storage);
}

bool same_host(int fd) noexcept {
  sockaddr_storage here{}, there{};
  socklen_t size = sizeof here, other = sizeof there;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&here), &size) != 0 ||
      ::getpeername(fd, reinterpret_cast<sockaddr*>(&there), &other) != 0 ||
      here.ss_family != there.ss_family)
    return false;
  if (here.ss_family == AF_INET)
    return reinterpret_cast<const sockaddr_in&>(here).sin_addr.s_addr ==
           reinterpret_cast<const sockaddr_in&>(there).sin_addr.s_addr;
  return std::memcmp(&reinterpret_cast<const sockaddr_in6&>(here).sin6_addr,
                     &reinterpret_cast<const sockaddr_in6&>(there).sin6_addr,
                     sizeof(in6_addr)) == 0;
}

void read_exact(Stream& stream, std::span<std::byte> out, const Patience& patience) {
  while (!out.empty()) {
    const iovec into{out.data(), out.size()};
    const ssize_t n = stream.receive({&into, 1});
    if (n > 0) {
      out = out.subspan(static_cast<size_t>(n));
    } else if (n == 0) {
      fail(Code::kPeerDisconnected, "the other side closed the connection during the handshake");
    } else if (errno == EAGAIN) {
      if (!patience.wait(stream.fd(), POLLIN))
        fail(Code::kTimeout, "the other side did not answer in the handshake in time");
    } else if (errno != EINTR) {
      fail_broken(stream, errno);
    }
  }
}

void write_all(Stream& stream, ByteView data, const Patience& patience) {
  bool flushed = false;
  while (!data.empty() || !flushed) {
    const iovec from{const_cast<std::byte*>(data.data()), data.size()};
    const ssize_t n = data.empty() ? (stream.flush() ? 0 : -1) : stream.send({&from, 1});
    if (n >= 0) {
      flushed = data.empty();
      data = data.subspan(static_cast<size_t>(n));
    } else if (errno == EAGAIN) {
      if (!patience.wait(stream.fd(), POLLOUT))
        fail(Code::kTimeout, "the other side did not read the handshake in time");
    } else if (errno != EINTR) {
      fail_broken(stream, errno);
    }
  }
}

}  // namespace kvxfer::tcp
