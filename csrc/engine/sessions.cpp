// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How peers come, attach, announce their regions, and are lost.
#include <algorithm>

#include "engine/engine.hpp"

namespace kvxfer {
namespace {
constexpr int64_t kLastWordsNs = 20'000'000;
constexpr size_t kMaxLostPeers = 256;  // kept for stats() and late questions
}  // namespace

PeerPtr Engine::peer_for(const PeerIdentity& identity) {
  auto [it, inserted] = peers_.try_emplace(identity.incarnation);
  if (inserted) {
    it->second = std::make_shared<Peer>();
    it->second->owner = this;
    it->second->identity = identity;  // never written again, so it is read without a lock
  }
  PeerPtr peer = it->second;
  if (inserted) forget_old_peers();
  return peer;
}

void Engine::forget_old_peers() {
  if (peers_.size() <= kMaxLostPeers) return;
  for (auto it = peers_.begin(); it != peers_.end() && peers_.size() > kMaxLostPeers;) {
    Peer& peer = *it->second;
    // Only we know of it, and it has no session.
    if (it->second.use_count() == 1 && !peer.alive) {
      for (auto& [name, totals] : peer.past) forgotten_[name].add(totals);
      it = peers_.erase(it);
    } else {
      ++it;
    }
  }
}

LinkPtr Engine::open_link(const std::shared_ptr<tcp::TcpConnection>& connection, bool initiator) {
  auto link = std::make_shared<Link>();
  link->control = connection;
  link->initiator = initiator ? identity_.incarnation : connection->session().peer.incarnation;
  PeerPtr peer = peer_for(connection->session().peer);
  connection->peer = peer;
  if (allows("tcp")) link->data.push_back(connection);
  pending_.emplace(connection->session().id, std::pair{peer, link});
  return link;
}

void Engine::announce(Link& link) {
  for (auto& [id, region] : regions_)
    link.control->send_control(encode(RegionAdded{{region->id, region->key},
                                                  region->nbytes,
                                                  region->writable,
                                                  region->name,
                                                  region->device}));
  link.control->send_ready();
  link.announced = true;
}

void Engine::broadcast(const Control& message) {
  const Bytes payload = encode(message);
  for (auto& [id, pending] : pending_)
    if (pending.second->announced) pending.second->control->send_control(payload);
  for (auto& [incarnation, peer] : peers_) {
    std::lock_guard lock(peer->mutex);
    for (auto& link : peer->links) link->control->send_control(payload);
  }
}

bool Engine::opened(const std::shared_ptr<tcp::TcpConnection>& connection) noexcept {
  std::lock_guard lock(mutex_);
  if (closed()) return false;
  LinkPtr link = open_link(connection, false);
  link->timer = reactor_.at(deadline_after(kReadyTimeoutS), [connection] {
    connection->close({.code = Code::kTransport, .text = "the peer did not get ready in time"});
  });
  return true;
}

std::optional<Session> Engine::session(const Key& id) noexcept {
  std::lock_guard lock(mutex_);
  auto it = pending_.find(id);
  if (it == pending_.end()) return {};
  return it->second.second->control->session();
}

void Engine::adopt(const Key& session, std::shared_ptr<Connection> connection) {
  const char* refusal = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto it = pending_.find(session);
    if (it == pending_.end() || closed()) {
      refusal = "its session has ended";
    } else if (std::ranges::any_of(it->second.second->data, [&](auto& other) {
                 return other->transport() == connection->transport();
               })) {
      // A peer that joins again and again would have our descriptors and memory.
      refusal = "its session has joined by this transport before";
    } else {
      auto& [peer, link] = it->second;
      connection->peer = peer;
      // Best first, in the registry's order.
      auto rank = [](const std::shared_ptr<Connection>& c) {
        const auto& names = all_transport_names();
        return std::ranges::find(names, c->transport()) - names.begin();
      };
      link->data.insert(std::ranges::upper_bound(link->data, rank(connection), {}, rank),
                        connection);
    }
  }
  if (refusal != nullptr) connection->close({.code = Code::kTransport, .text = refusal});
}

bool Engine::control(tcp::TcpConnection& from, ByteView payload) noexcept {
  auto message = decode_control(payload);
  auto peer = std::static_pointer_cast<Peer>(from.peer.lock());
  if (!message || !peer) return false;
  if (auto* added = std::get_if<RegionAdded>(&*message)) {
    auto region = std::make_shared<RemoteRegion>();
    region->ref = added->ref;
    region->name = added->name;
    region->nbytes = added->nbytes;
    region->writable = added->writable;
    region->device = added->device;
    region->peer = peer;
    std::lock_guard lock(peer->mutex);
    auto it = peer->regions.find(added->name);
    if (it == peer->regions.end()) {
      if (peer->regions.size() >= kMaxRegions) return false;
      peer->regions.emplace(added->name, std::move(region));
    } else if (it->second->ref.id != added->ref.id) {  // a second session announces the same ones
      it->second = std::move(region);
    }
  } else if (auto* removed = std::get_if<RegionRemoved>(&*message)) {
    std::lock_guard lock(peer->mutex);
    std::erase_if(peer->regions, [&](auto& entry) { return entry.second->ref.id == removed->id; });
  } else if (auto* attach = std::get_if<Attach>(&*message)) {
    return on_attach(from, std::move(*attach));
  } else {
    const uint32_t count = std::get<Credit>(*message).count;
    {
      std::lock_guard lock(peer->mutex);
      if (count > kNotifyWindow) return false;
      peer->credits = std::min(peer->credits + count, kNotifyWindow);
    }
    kick(peer);
  }
  // Who waits for a region of the peer sleeps on Engine::fileno().
  if (!std::holds_alternative<Credit>(*message)) signal();
  return true;
}

// A transport's question or answer while a session is being set up; what comes later is nobody's.
bool Engine::on_attach(tcp::TcpConnection& from, Attach attach) noexcept {
  const Session& session = from.session();
  LinkPtr link;
  {
    std::lock_guard lock(mutex_);
    auto it = pending_.find(session.id);
    if (it == pending_.end()) return true;
    link = it->second.second;
    if (attach.is_answer) link->answer = std::move(attach);
  }
  if (attach.is_answer) {
    link->changed.notify_all();
    return true;
  }
  if (session.initiator) return false;  // it is we who ask
  auto it = std::ranges::find(transports_, attach.transport, [](auto& each) { return each.first; });
  if (it == transports_.end()) return false;  // it was not offered
  attach.data = it->second->answer(session, attach.data);
  attach.is_answer = true;
  from.send_control(encode(attach));
  return true;
}

std::optional<Bytes> Engine::ask(const Session& session, std::string_view transport,
                                 ByteView question, const Patience& patience, std::string& reason) {
  LinkPtr link;
  {
    std::lock_guard lock(mutex_);
    auto it = pending_.find(session.id);
    if (it == pending_.end() || closed()) {
      reason = "the session has ended";
      return {};
    }
    link = it->second.second;
    link->answer.reset();
  }
  link->control->send_control(
      encode(Attach{std::string(transport), false, Bytes(question.begin(), question.end())}));
  for (;;) {
    const uint32_t seen = link->changed.read();
    {
      std::lock_guard lock(mutex_);
      if (link->answer && link->answer->transport == transport)
        return std::move(link->answer->data);
      if (link->lost || closed()) {
        reason = cat("the session ended while it attached: ", link->cause.text);
        return {};
      }
    }
    if (patience.wait(link->changed, seen)) continue;
    reason = "the peer did not answer in time";
    return {};
  }
}

void Engine::ready(tcp::TcpConnection& from) noexcept {
  PeerPtr peer;
  LinkPtr link;
  bool is_new = false;
  {
    std::lock_guard lock(mutex_);
    auto it = pending_.find(from.session().id);
    if (it == pending_.end()) return;
    std::tie(peer, link) = it->second;
    pending_.erase(it);
    reactor_.cancel(link->timer);
    if (!link->announced) announce(*link);
    watch_process(link);
    link->ready = true;
    std::lock_guard inner(peer->mutex);
    // Both sides order by who connected, so that crossed connects leave one in use.
    auto at = std::ranges::upper_bound(peer->links, link->initiator, {}, &Link::initiator);
    peer->links.insert(at, link);
    is_new = !peer->alive.exchange(true, std::memory_order_acq_rel);
    if (is_new) {
      peer->credits = kNotifyWindow;
      peer->drained = 0;
      peer->lost_because.clear();
      std::lock_guard innermost(inbox_mutex_);
      events_.push_back({true, peer, {}});
    }
  }
  link->changed.notify_all();
  if (is_new) signal();
  kick(peer);
}

void Engine::lost(Connection& from, const Failure& cause) noexcept {
  auto peer = std::static_pointer_cast<Peer>(from.peer.lock());
  if (!peer) return;
  LinkPtr link;
  std::shared_ptr<Connection> control;
  bool was_alive = false;
  {
    std::lock_guard lock(mutex_);
    auto holds = [&](const LinkPtr& each) {
      if (each->control.get() != &from &&
          std::ranges::any_of(each->data, [&](auto& c) { return c.get() == &from; }))
        control = each->control;
      return each->control.get() == &from;
    };
    for (auto it = pending_.begin(); it != pending_.end(); ++it)
      if (holds(it->second.second)) {
        link = it->second.second;
        reactor_.cancel(link->timer);
        pending_.erase(it);
        break;
      }
    std::lock_guard inner(peer->mutex);
    if (!link) {
      auto it = std::ranges::find_if(peer->links, holds);
      if (control) {
        // One transport's death is the session's: what it carried cannot be told apart. But only
        // the control lane can tell the reason (BYE), and it may be a moment behind.
        reactor_.at(now_ns() + kLastWordsNs, [control, cause] { control->close(cause); });
        return;
      }
      if (it == peer->links.end()) return;  // its session went before it
      link = *it;
      peer->links.erase(it);
      for (auto& connection : link->data)
        peer->past[std::string(connection->transport())].add(connection->counters);
      if (std::ranges::find(link->data, link->control) == link->data.end())
        peer->past["tcp"].add(link->control->counters);
      if (peer->links.empty()) {
        was_alive = peer->alive.exchange(false, std::memory_order_acq_rel);
        peer->lost_because = cause.text;
        peer->regions.clear();
      }
    }
    link->lost = true;
    link->cause = cause;
  }
  unwatch_process(*link);
  for (auto& connection : link->data)
    if (connection.get() != &from) connection->close(cause);
  link->changed.notify_all();
  if (was_alive) {
    {
      // Last: whoever takes the event finds nothing of the peer's mapped any more.
      std::lock_guard lock(inbox_mutex_);
      events_.push_back({false, peer, cause.text});
    }
    peer->tags_changed.notify_all();
    signal();
  }
  kick(peer);
}

Bytes Engine::offers() {
  std::vector<Offer> out;
  for (auto& [name, transport] : transports_) out.push_back({name, transport->offer()});
  return encode_offers(out);
}

void Engine::turned_away(const std::string& address, const std::string& reason) noexcept {
  std::lock_guard lock(mutex_);
  ++handshakes_refused_;
  last_handshake_refusal_ = cat(address, ": ", reason);
}

}  // namespace kvxfer
