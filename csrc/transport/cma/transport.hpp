// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Same host, cross-memory attach: shm's rings and slot words, but the owner of the destination
// reads the peer's memory with process_vm_readv. One copy for memory that cannot be mapped, where
// the kernel allows it; a spare for where shm cannot be had.
#pragma once

#include <memory>

#include "transport/shm/transport.hpp"

namespace kvxfer::cma {

class CmaTransport final : public shm::ShmTransport {
 public:
  explicit CmaTransport(const TransportConfig& config);
  std::string_view name() const noexcept override { return "cma"; }
  bool is_spare() const noexcept override { return true; }
  std::optional<std::string> probe() const override;
  void start(Host& host) override;
  void stop() noexcept override;

 private:
  Bytes introduction() const override;
  std::unique_ptr<shm::Reach> meet(int socket, const PeerIdentity& peer, ByteView introduction,
                                   std::string& reason) const override;

  // What peers read to see that this process is still us. Zero before start and after stop.
  struct alignas(16) Word {
    Incarnation incarnation{};
  };
  const std::unique_ptr<Word> word_;
};

}  // namespace kvxfer::cma
