// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Addresses and sockets: "host:port", IPv4, IPv6 ("[::1]:0") and names.
#pragma once

#include <cstdint>
#include <string>

#include "common/fd.hpp"
#include "common/patience.hpp"
#include "common/wire.hpp"
#include "transport/tcp/stream.hpp"

namespace kvxfer::tcp {

struct HostPort {
  std::string host;
  uint16_t port = 0;
};
HostPort parse_address(const std::string& address);  // throws kInvalidArgument

struct Listener {
  Fd fd;
  std::string address;  // with the port that the kernel chose
  bool loopback = true;
};
Listener listen(const std::string& address);

// Non-blocking, TCP_NODELAY, keepalive. `bulk`: keeps the unsent queue short.
Fd connect(const std::string& address, const Patience& patience, bool bulk);
void set_options(int fd, bool bulk) noexcept;
std::string peer_address(int fd);
// Both ends have one IP address: they share a network namespace, hence a kernel.
bool same_host(int fd) noexcept;

// For the connecting side of the handshake. Throw kTimeout, kPeerDisconnected or kCancelled.
void read_exact(Stream& stream, std::span<std::byte> out, const Patience& patience);
void write_all(Stream& stream, ByteView data, const Patience& patience);

}  // namespace kvxfer::tcp
