// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/cma/transport.hpp"

#include <sys/prctl.h>
#include <unistd.h>

#include "common/error.hpp"
#include "transport/cma/peer.hpp"
#include "transport/shm/unix_socket.hpp"

namespace kvxfer::cma {

CmaTransport::CmaTransport(const TransportConfig& config)
    : ShmTransport(config), word_(std::make_unique<Word>()) {}

std::optional<std::string> CmaTransport::probe() const {
  const Peer self{::getpid(), reinterpret_cast<uint64_t>(word_.get()), word_->incarnation};
  if (auto failure = self.identify())
    return cat(failure->text, failure->err != 0 ? " on our own process" : "");
  return {};
}

void CmaTransport::start(Host& host) {
  word_->incarnation = host.self().incarnation;
  // Opens this process to every program of its user, so only where the user said so. Fails where
  // there is no Yama, and then it is not needed.
  if (config().allow_ptrace) ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  ShmTransport::start(host);
}

void CmaTransport::stop() noexcept {
  ShmTransport::stop();
  word_->incarnation = {};
}

Bytes CmaTransport::introduction() const {
  Bytes bytes;
  Writer(bytes).u64(reinterpret_cast<uint64_t>(word_.get()));
  return bytes;
}

// Called on both sides before a connection exists, so each direction has been tried once.
std::unique_ptr<shm::Reach> CmaTransport::meet(int socket, const PeerIdentity& peer,
                                               ByteView introduction, std::string& reason) const {
  Reader reader(introduction);
  const uint64_t address = reader.u64();
  if (!reader.finished()) return reason = "a malformed introduction", nullptr;
  const int pid = shm::peer_pid(socket);
  if (pid <= 0)
    return reason = "the peer's process is not visible here (another pid namespace)", nullptr;
  auto other = std::make_shared<Peer>(pid, address, peer.incarnation);
  if (auto failure = other->identify()) return reason = failure->text, nullptr;
  return make_reach(std::move(other));
}

}  // namespace kvxfer::cma
