// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// RDMA verbs: RC queue pairs that are set up inside an authenticated session. Bytes are pulled by
// the NIC of whoever owns their destination, so no region is remotely writable; or, where both
// engines want it, writes under a lease are pushed through a window that is the lease's.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transport/config.hpp"
#include "transport/transport.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {

class VerbsTransport final : public Transport {
 public:
  explicit VerbsTransport(const TransportConfig& config) : config_(config) {}
  std::string_view name() const noexcept override { return "verbs"; }
  // On one host shared memory is quicker and asks for no NIC.
  bool is_spare() const noexcept override { return true; }
  std::optional<std::string> probe() const override;
  std::string detail() const override;
  void start(Host& host) override;
  void stop() noexcept override;
  Bytes offer() const override;
  std::optional<std::string> attach(const Session& session, ByteView offer,
                                    const Patience& patience) override;
  Bytes answer(const Session& session, ByteView question) override;
  void expose(const std::shared_ptr<Region>& region) override;
  void withdraw(Region& region) noexcept override { memory_.remove(region.id); }
  void revoked(const Lease& lease) noexcept override;

 private:
  struct EventHandler;
  // What a peer reads to see that the path works and that this is us.
  struct alignas(16) Word {
    Incarnation incarnation{};
  };
  struct Half {  // an acceptor's connection that the other side has not committed to yet
    std::shared_ptr<VerbsConnection> connection;
    Reactor::TimerId timer;
  };
  Route route_to(const Device& device, const Path& path, const PortAddress& remote,
                 size_t num_ports) const;
  // By Device::index(); without anything where it cannot be used now.
  std::vector<PortAddress> own_addresses() const;
  // Why a connection over these devices pushes nothing and gives no windows; or empty.
  std::string why_no_push(const Devices& devices) const;
  std::string unusable() const;  // why no new connection can be made; or empty
  std::string join(const Session& session, Reader& question, Bytes& reply);
  std::string commit(const Session& session);
  void keep(const std::shared_ptr<VerbsConnection>& connection);
  std::vector<std::shared_ptr<VerbsConnection>> alive();
  void on_events(Device& device);
  void port_event(Device& device, bool up, const std::string& event);

  const TransportConfig config_;
  // Opened by probe(), which the engine calls before anything else; the engine's thread.
  mutable Devices devices_;
  mutable std::unique_ptr<Word> word_;
  mutable std::unique_ptr<Registration> word_registration_;
  Host* host_ = nullptr;
  MemoryTable memory_;
  std::vector<Reactor::Token> tokens_;  // by device

  std::map<Key, Half> halves_;  // progress thread only
  std::mutex mutex_;            // over the next one
  std::vector<std::weak_ptr<VerbsConnection>> connections_;
};

}  // namespace kvxfer::verbs
