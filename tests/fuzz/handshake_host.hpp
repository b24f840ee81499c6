// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine as far as a handshake needs it: it knows who it is and hears of finished sessions.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fuzz.hpp"
#include "transport/tcp/transport.hpp"

namespace kvxfer::fuzz {

class HandshakeHost final : public tcp::SessionHost {
 public:
  explicit HandshakeHost(uint8_t who = 7) {
    self_.name = "fuzzed", self_.address = "127.0.0.1:1", self_.host.boot_id = "boot";
    self_.incarnation[0] = std::byte{who};
  }
  Reactor& reactor() noexcept override { return reactor_; }  // not started: one thread does it all
  const PeerIdentity& self() const noexcept override { return self_; }
  // False: the connection is not started, only its session looked at.
  bool opened(const std::shared_ptr<tcp::TcpConnection>& connection) noexcept override {
    sessions.push_back(connection->session());
    return false;
  }
  Bytes offers() override { return tcp::encode_plain(tcp::Type::kOffer, {}); }
  void turned_away(const std::string&, const std::string& reason) noexcept override {
    FUZZ_CHECK(!reason.empty());
    ++num_turned_away;
  }

  std::vector<Session> sessions;
  size_t num_turned_away = 0;

  // No session is ever started, so nothing of a connection's life comes here.
  const std::shared_ptr<CopyPool>& copy_pool() const noexcept override { return pool_; }
  bool control(tcp::TcpConnection&, ByteView) noexcept override { std::abort(); }
  void ready(tcp::TcpConnection&) noexcept override { std::abort(); }
  void posted(Request&) noexcept override { std::abort(); }
  void ended(Connection&, const RequestPtr&, Completion) noexcept override { std::abort(); }
  void quiesced(Request&) noexcept override { std::abort(); }
  void writable(Connection&) noexcept override { std::abort(); }
  void unshown(Connection&, const Request&) noexcept override { std::abort(); }
  std::optional<Failure> admit(Connection&, const Access&, Landing&) noexcept override {
    std::abort();
  }
  std::optional<Failure> accept(Connection&, Landing&, Arrival) noexcept override { std::abort(); }
  std::optional<Session> session(const Key&) noexcept override { std::abort(); }
  void adopt(const Key&, std::shared_ptr<Connection>) override { std::abort(); }
  void lost(Connection&, const Failure&) noexcept override { std::abort(); }

 private:
  Reactor reactor_;
  PeerIdentity self_;
  std::shared_ptr<CopyPool> pool_;
};

}  // namespace kvxfer::fuzz
