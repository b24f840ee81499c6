// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Same host: control segment, memfds and bells passed over a Unix socket that joins an
// authenticated session.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "transport/config.hpp"
#include "transport/shm/connection.hpp"
#include "transport/transport.hpp"

namespace kvxfer::shm {

class ShmTransport : public Transport {
 public:
  explicit ShmTransport(const TransportConfig& config) : config_(config) {}
  std::string_view name() const noexcept override { return "shm"; }
  std::optional<std::string> probe() const override;
  void start(Host& host) override;
  void stop() noexcept override;
  Bytes offer() const override;
  std::optional<std::string> attach(const Session& session, ByteView offer,
                                    const Patience& patience) override;
  void withdraw(Region& region) noexcept override;

 protected:
  // What another way of reaching memory (cma) does otherwise.
  // Travels to the peer inside the offer and the join.
  virtual Bytes introduction() const { return {}; }
  // The way to the peer at the other end of `socket`, tried once; empty and `reason` set when it
  // cannot be gone.
  virtual std::unique_ptr<Reach> meet(int socket, const PeerIdentity& peer, ByteView introduction,
                                      std::string& reason) const;
  const TransportConfig& config() const noexcept { return config_; }

 private:
  struct Listener;
  struct Joining;
  void keep(const std::shared_ptr<ShmConnection>& connection);

  const TransportConfig config_;
  Host* host_ = nullptr;
  std::string socket_name_;
  std::shared_ptr<Listener> listener_;
  Reactor::Token listener_token_ = 0;

  std::mutex mutex_;  // over the connections, for withdraw()
  std::vector<std::weak_ptr<ShmConnection>> connections_;
};

}  // namespace kvxfer::shm
