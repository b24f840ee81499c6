// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The tcp transport: listens, connects, authenticates, and makes the sessions that others attach
// to.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "transport/config.hpp"
#include "transport/tcp/connection.hpp"
#include "transport/tcp/handshake.hpp"
#include "transport/tcp/socket.hpp"

namespace kvxfer::tcp {

inline constexpr double kHandshakeTimeoutS = 2.0;
// Many engines may come at once, each with its lanes; and a flood must leave descriptors to others.
inline constexpr size_t kMaxHalfOpen = 256;

class Incoming;
class TlsContext;

class TcpTransport {
 public:
  TcpTransport(SessionHost& host, Bytes secret, const TransportConfig& config);
  ~TcpTransport();

  // Binds, so that the address is known; start() begins to accept.
  std::string listen(const std::string& address, bool* loopback);
  void start();
  void stop() noexcept;  // after the reactor has stopped

  // Connecting side, on the caller's thread: authenticated, lanes joined, not yet started.
  struct Established {
    std::shared_ptr<TcpConnection> connection;
    Bytes offers;  // of the peer's other transports
  };
  // `wanted` is asked once the peer has proved who it is; false ends the attempt (it is known
  // already), and the result is empty.
  using Wanted = std::function<bool(const PeerIdentity&)>;
  Established connect(const std::string& address, const Patience& patience, const Wanted& wanted);

  // What is below listen() and connect(), whatever the streams are; fuzzed by tests/fuzz.
  // `dial` opens one: lane 0 first, then the bulk lanes.
  using Dial = std::function<StreamPtr(bool bulk)>;
  Established establish(const Dial& dial, const Patience& patience, const Wanted& wanted);
  // Begins the acceptor's side on a socket, which the reactor then drives.
  std::shared_ptr<FdHandler> take(Fd fd);

 private:
  friend class Incoming;
  struct Acceptor;
  void accept_all() noexcept;
  void forget(Incoming* incoming) noexcept;
  Hello hello() const;
  StreamPtr secure(Fd fd, const Patience& patience) const;

  SessionHost& host_;
  const Bytes secret_;
  const TransportConfig config_;
  const std::shared_ptr<TlsContext> tls_;  // null: plain
  Listener listener_;
  Reactor::Token token_ = 0;
  uint64_t next_serial_ = 0;
  // Half-open connections; progress thread only.
  std::map<Incoming*, std::shared_ptr<Incoming>> incoming_;
};

}  // namespace kvxfer::tcp
