// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/attached.hpp"

#include <utility>

#include "common/random.hpp"
#include "common/sha256.hpp"

namespace kvxfer::tcp {
namespace {

Digest prove(const Session& first, const Session& second) {
  return hmac_sha256(first.key,
                     {as_bytes_view("kvxfer tcp join"), ByteView(first.id), ByteView(second.id)});
}

}  // namespace

void AttachedTcp::start(Host& host) {
  host_ = &host;
  const auto random = random_bytes<32>();
  secret_.assign(random.begin(), random.end());
  acceptor_ = std::make_unique<TcpTransport>(*this, secret_, config_);
  bool loopback = true;
  address_ = acceptor_->listen("127.0.0.1:0", &loopback);
  acceptor_->start();
}

Bytes AttachedTcp::offer() const {
  Bytes bytes;
  Writer writer(bytes);
  writer.text(address_);
  writer.raw(secret_);
  return bytes;
}

std::optional<std::string> AttachedTcp::attach(const Session& session, ByteView offer,
                                               const Patience& patience) {
  Reader reader(offer);
  const std::string address = reader.text(64);
  const ByteView secret = reader.take(32);
  if (!reader.finished()) return "a malformed offer";
  TcpTransport connector(*this, Bytes(secret.begin(), secret.end()), config_);
  auto connection =
      connector.connect(address, patience, [](const PeerIdentity&) { return true; }).connection;
  auto joining = std::make_shared<Joining>();
  {
    std::lock_guard lock(mutex_);
    joining_.emplace(connection.get(), joining);
  }
  struct Leave {
    ~Leave() {
      std::lock_guard lock(self.mutex_);
      self.joining_.erase(connection);
    }
    AttachedTcp& self;
    const TcpConnection* connection;
  } leave{*this, connection.get()};
  host_->adopt(session.id, connection);
  connection->start();
  Bytes join;
  Writer writer(join);
  writer.put(session.id);
  writer.put(prove(session, connection->session()));
  connection->send_control(join);
  for (;;) {
    const uint32_t seen = joining->changed.read();
    {
      std::lock_guard lock(mutex_);
      if (joining->ready) return {};
      if (joining->lost) return "the peer ended the second session";
    }
    if (!patience.wait(joining->changed, seen)) return "the peer did not answer the join in time";
  }
}

bool AttachedTcp::opened(const std::shared_ptr<TcpConnection>&) noexcept { return true; }

// Acceptor's side: the join. Anything else ends the connection.
bool AttachedTcp::control(TcpConnection& from, ByteView payload) noexcept {
  Reader reader(payload);
  const auto id = reader.get<Key>();
  const auto proof = reader.get<Digest>();
  if (!reader.finished()) return false;
  const auto first = host_->session(id);
  if (!first || !equal_constant_time(proof, prove(*first, from.session()))) return false;
  host_->adopt(id, std::static_pointer_cast<TcpConnection>(from.shared_from_this()));
  from.send_ready();
  return true;
}

void AttachedTcp::ready(TcpConnection& from) noexcept {
  std::lock_guard lock(mutex_);
  auto it = joining_.find(&from);
  if (it == joining_.end()) return;
  it->second->ready = true;
  it->second->changed.notify_all();
}

void AttachedTcp::lost(Connection& from, const Failure& cause) noexcept {
  {
    std::lock_guard lock(mutex_);
    if (auto it = joining_.find(&from); it != joining_.end()) {
      it->second->lost = true;
      it->second->changed.notify_all();
    }
  }
  host_->lost(from, cause);
}

}  // namespace kvxfer::tcp
