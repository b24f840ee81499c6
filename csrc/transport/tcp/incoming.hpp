// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// An accepted socket that has not proved anything yet: the acceptor's side of the handshake.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "transport/tcp/tls.hpp"
#include "transport/tcp/transport.hpp"

namespace kvxfer::tcp {

// Progress thread only. It costs one buffer of kMaxHandshakeBytes (under TLS, OpenSSL's state too),
// ends after kHandshakeTimeoutS, and a mistake of the stranger's ends it alone.
class Incoming final : public FdHandler, public std::enable_shared_from_this<Incoming> {
 public:
  Incoming(TcpTransport& transport, Fd fd, uint64_t serial);
  uint64_t serial() const noexcept { return serial_; }
  void start();
  void on_events(uint32_t events) override;
  void end(const std::string& reason, bool tell);
  // At once, with a last word that may be lost.
  void give_way(const std::string& reason);
  bool has_proved() const noexcept { return want_ == Want::kLanes; }

 private:
  enum class Want : uint8_t { kGreeting, kTls, kFirst, kAuth, kLanes, kNothing };
  void on_greeting();
  void on_tls();
  void linger();
  bool read_frame();  // true: head_ and control_ hold a whole frame
  void on_frame();
  void on_hello();
  void on_auth();
  void on_join();
  void take_lane(uint32_t index, StreamPtr stream);
  void complete();
  void leave_reactor();
  bool send(ByteView bytes);

  TcpTransport& transport_;
  StreamPtr stream_;
  TlsStream* tls_ = nullptr;  // stream_, where it is one
  const uint64_t serial_;
  std::string address_;
  Reactor::Token token_ = 0;
  Reactor::TimerId timer_ = Reactor::kNoTimer;
  Want want_ = Want::kGreeting;
  Bytes buffer_;  // reads exactly one frame: what follows AUTH may belong to the connection
  size_t have_ = 0;
  Head head_;
  Transcript transcript_;
  Hello peer_;
  Keys keys_;
  uint32_t num_lanes_ = 0;
  std::vector<StreamPtr> lanes_;
  bool ended_ = false;
};

}  // namespace kvxfer::tcp
