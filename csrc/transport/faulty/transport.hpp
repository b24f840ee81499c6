// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Wraps another transport and makes things go wrong on it, by a seeded plan. For tests: it is used
// only when it is named.
#pragma once

#include <atomic>
#include <memory>

#include "transport/config.hpp"
#include "transport/faulty/connection.hpp"
#include "transport/transport.hpp"

namespace kvxfer::faulty {

// The transport below takes this for the engine.
class FaultyTransport final : public Transport, private Host {
 public:
  explicit FaultyTransport(const TransportConfig& config);
  ~FaultyTransport() override;
  std::string_view name() const noexcept override { return "faulty"; }
  std::optional<std::string> probe() const override { return below_->probe(); }
  void start(Host& host) override;
  void stop() noexcept override { below_->stop(); }
  Bytes offer() const override { return below_->offer(); }
  std::optional<std::string> attach(const Session& session, ByteView offer,
                                    const Patience& patience) override {
    return below_->attach(session, offer, patience);
  }
  Bytes answer(const Session& session, ByteView question) override {
    return below_->answer(session, question);
  }
  void expose(const std::shared_ptr<Region>& region) override { below_->expose(region); }
  void withdraw(Region& region) noexcept override { below_->withdraw(region); }
  void revoked(const Lease& lease) noexcept override { below_->revoked(lease); }

 private:
  Reactor& reactor() noexcept override { return host_->reactor(); }
  const std::shared_ptr<CopyPool>& copy_pool() const noexcept override {
    return host_->copy_pool();
  }
  const PeerIdentity& self() const noexcept override { return host_->self(); }
  void posted(Request& request) noexcept override;
  void ended(Connection& from, const RequestPtr& request, Completion completion) noexcept override;
  void quiesced(Request& request) noexcept override;
  void writable(Connection& from) noexcept override;
  void unshown(Connection& from, const Request& request) noexcept override;
  std::optional<Failure> admit(Connection& from, const Access& access,
                               Landing& out) noexcept override;
  std::optional<Failure> accept(Connection& from, Landing& landing,
                                Arrival arrival) noexcept override;
  std::optional<Session> session(const Key& id) noexcept override { return host_->session(id); }
  // The peer's faulty transport answers for the one below it.
  std::optional<Bytes> ask(const Session& session, std::string_view, ByteView question,
                           const Patience& patience, std::string& reason) override {
    return host_->ask(session, name(), question, patience, reason);
  }
  void adopt(const Key& session, std::shared_ptr<Connection> connection) override;
  void lost(Connection& from, const Failure& cause) noexcept override;

  const Plan plan_;
  const std::unique_ptr<Transport> below_;
  Host* host_ = nullptr;
  // Any thread that attaches adds one; relaxed, since only the number matters.
  std::atomic<uint64_t> num_connections_{0};
};

}  // namespace kvxfer::faulty
