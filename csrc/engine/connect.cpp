// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How we come to a peer: connect(), on its caller's thread.
#include <algorithm>

#include "engine/engine.hpp"

namespace kvxfer {

PeerPtr Engine::connect(const std::string& address, double timeout_s,
                        const std::function<bool()>& interrupted) {
  check_open();
  const Patience patience(deadline_after(timeout_s),
                          [&] { return closed() || (interrupted && interrupted()); });
  try {
    PeerPtr known;
    const auto established = tcp_->connect(address, patience, [&](const PeerIdentity& who) {
      if (who.incarnation == identity_.incarnation)
        fail(Code::kInvalidArgument, "an engine cannot be its own peer");
      std::lock_guard lock(mutex_);
      auto it = peers_.find(who.incarnation);
      if (it != peers_.end() && it->second->alive) known = it->second;
      return known == nullptr;
    });
    return known ? known : join_peer(established, address, patience);
  } catch (const Error&) {
    check_open();  // whatever else went wrong: that is why
    throw;
  }
}

// The session is authenticated, and nobody knows of it yet.
PeerPtr Engine::join_peer(const tcp::TcpTransport::Established& established,
                          const std::string& address, const Patience& patience) {
  const auto& connection = established.connection;
  const Session session = connection->session();
  LinkPtr link;
  PeerPtr peer;
  {
    std::lock_guard lock(mutex_);
    check_open();
    link = open_link(connection, true);
    peer = pending_.at(session.id).first;
    connection->start();
  }
  try {
    attach_all(*link, session, established.offers, patience);
    await_ready(*link, patience);
  } catch (const Error& error) {
    connection->close({.code = Code::kTransport, .text = error.what()});
    throw Error(
        error.code,
        cat("connecting to '", session.peer.name, "' at ", address, " failed: ", error.what()),
        error.err, "tcp", address);
  }
  return peer;
}

// Each refusal is kept for explain().
void Engine::attach_all(Link& link, const Session& session, ByteView encoded_offers,
                        const Patience& patience) {
  const auto offers = decode_offers(encoded_offers);
  if (!offers) fail(Code::kTransport, "malformed offers");
  std::vector<std::string> refusals;
  size_t num_tried = 0;
  int err = 0;  // of the first that says one
  for (auto& [name, transport] : transports_) {
    patience.look();
    auto offer = std::ranges::find(*offers, name, &Offer::transport);
    std::optional<std::string> refusal;
    if (offer == offers->end()) {
      refusal = "the peer does not offer it";
    } else if (transport->is_spare() && refusals.size() < num_tried) {
      refusal = "not needed: a better way is there";
    } else {
      try {
        refusal = transport->attach(session, offer->data, patience);
      } catch (const Error& error) {
        if (error.code == Code::kCancelled) throw;
        refusal = error.what();
        if (err == 0) err = error.err;
      }
    }
    if (refusal) refusals.push_back(cat(name, ": ", *refusal));
    ++num_tried;
  }
  patience.look();
  std::lock_guard lock(mutex_);
  link.refusals = refusals;
  if (!link.data.empty()) return;
  std::string reasons;
  for (auto& refusal : refusals) reasons += cat(reasons.empty() ? "" : "; ", refusal);
  throw Error(Code::kUnavailable, cat("none of the transports asked for can be used: ", reasons),
              err);
}

void Engine::await_ready(Link& link, const Patience& patience) {
  {
    std::lock_guard lock(mutex_);
    announce(link);
  }
  for (;;) {
    const uint32_t seen = link.changed.read();
    {
      std::lock_guard lock(mutex_);
      if (link.ready) return;
      if (link.lost || closed()) break;
    }
    if (!patience.wait(link.changed, seen))
      fail(Code::kTimeout, "the peer did not get ready in time");
  }
  throw Error(link.cause.code, link.cause.text, link.cause.err);
}

}  // namespace kvxfer
