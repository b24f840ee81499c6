// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// tcp as a transport that attaches to a session, like any other: what `faulty` wraps, since the
// session's own connection is the engine's. It makes a second session and joins it to the first.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "common/wait_word.hpp"
#include "transport/config.hpp"
#include "transport/tcp/transport.hpp"

namespace kvxfer::tcp {

class AttachedTcp final : public Transport, public SessionHost {
 public:
  explicit AttachedTcp(const TransportConfig& config) : config_(config) {}
  std::string_view name() const noexcept override { return "tcp"; }
  std::optional<std::string> probe() const override { return {}; }
  void start(Host& host) override;
  void stop() noexcept override { acceptor_->stop(); }
  Bytes offer() const override;
  std::optional<std::string> attach(const Session& session, ByteView offer,
                                    const Patience& patience) override;

 private:
  // SessionHost: what the second session is about.
  bool opened(const std::shared_ptr<TcpConnection>& connection) noexcept override;
  bool control(TcpConnection& from, ByteView payload) noexcept override;
  void ready(TcpConnection& from) noexcept override;
  Bytes offers() override { return {}; }
  void turned_away(const std::string&, const std::string&) noexcept override {}
  void lost(Connection& from, const Failure& cause) noexcept override;
  // Host: passed on.
  Reactor& reactor() noexcept override { return host_->reactor(); }
  const std::shared_ptr<CopyPool>& copy_pool() const noexcept override {
    return host_->copy_pool();
  }
  const PeerIdentity& self() const noexcept override { return host_->self(); }
  void posted(Request& request) noexcept override { host_->posted(request); }
  void ended(Connection& from, const RequestPtr& request, Completion completion) noexcept override {
    host_->ended(from, request, std::move(completion));
  }
  void quiesced(Request& request) noexcept override { host_->quiesced(request); }
  void writable(Connection& from) noexcept override { host_->writable(from); }
  void unshown(Connection& from, const Request& request) noexcept override {
    host_->unshown(from, request);
  }
  std::optional<Failure> admit(Connection& from, const Access& access,
                               Landing& out) noexcept override {
    return host_->admit(from, access, out);
  }
  std::optional<Failure> accept(Connection& from, Landing& landing,
                                Arrival arrival) noexcept override {
    return host_->accept(from, landing, std::move(arrival));
  }
  std::optional<Session> session(const Key& id) noexcept override { return host_->session(id); }
  void adopt(const Key& session, std::shared_ptr<Connection> connection) override {
    host_->adopt(session, std::move(connection));
  }

  struct Joining {
    bool ready = false, lost = false;
    WaitWord changed;
  };

  const TransportConfig config_;
  Host* host_ = nullptr;
  Bytes secret_;  // of the second session; the peer learns it inside the first
  std::string address_;
  std::unique_ptr<TcpTransport> acceptor_;
  std::mutex mutex_;
  std::map<const Connection*, std::shared_ptr<Joining>> joining_;  // our attach() waits for these
};

}  // namespace kvxfer::tcp
