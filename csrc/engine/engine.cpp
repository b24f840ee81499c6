// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine's life, its regions, and what it tells the application.
#include "engine/engine.hpp"

#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>

#include "common/random.hpp"
#include "engine/memory.hpp"

namespace kvxfer {
namespace {

HostIdentity host_identity() {
  HostIdentity host;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> host.boot_id;
  struct stat st{};
  if (::stat("/proc/self/ns/net", &st) == 0) host.net_ns = st.st_ino;
  if (::stat("/proc/self/ns/pid", &st) == 0) host.pid_ns = st.st_ino;
  host.uid = ::getuid();
  host.pid = static_cast<uint32_t>(::getpid());
  return host;
}

void check_name(const char* what, const std::string& name) {
  if (name.empty() || name.size() > kMaxNameBytes)
    fail(Code::kInvalidArgument, what, " name must have 1 to ", kMaxNameBytes, " bytes, not ",
         name.size());
}

}  // namespace

Engine::Engine(EngineOptions options) : options_(std::move(options)) {
  check_name("engine", options_.name);
  if (options_.transport.num_lanes < 1 || options_.transport.num_lanes > tcp::kMaxLanes)
    fail(Code::kInvalidArgument, "num_lanes must be 1 to ", tcp::kMaxLanes, ", not ",
         options_.transport.num_lanes);
  if (options_.secret.empty()) fail(Code::kInvalidArgument, "the secret is empty");
  const auto& names = all_transport_names();
  for (const std::string& name : options_.transports)
    if (std::ranges::find(names, name) == names.end()) {
      std::string known;
      for (const auto& each : transport_names()) known += (known.empty() ? "" : ", ") + each;
      fail(Code::kInvalidArgument, "unknown transport '", name, "'; known are ", known);
    }
  identity_.name = options_.name;
  identity_.incarnation = random_bytes<16>();
  identity_.host = host_identity();
  event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event_) fail_errno(Code::kUnavailable, errno, "eventfd failed");

  for (const std::string& name : names) {
    if (name == "tcp" || !allows(name)) continue;
    auto transport = make_transport(name, options_.transport);
    if (auto reason = transport->probe()) {
      if (!options_.transports.empty())
        fail(Code::kUnavailable, "transport '", name,
             "' was asked for, but does not work here: ", *reason);
      not_here_.push_back(cat(name, ": ", *reason));
      continue;
    }
    transports_.emplace_back(name, std::move(transport));
  }
  if (!transports_.empty()) words_ = std::make_shared<ExportedWords>();
  tcp_ = std::make_unique<tcp::TcpTransport>(*this, options_.secret, options_.transport);
  bool loopback = true;
  identity_.address = tcp_->listen(options_.listen, &loopback);
  if (!loopback && !options_.secret_is_explicit)
    fail(Code::kInvalidArgument, "listening on ", identity_.address,
         ", which is not loopback, needs an explicit ",
         "secret=: anyone who can reach it could otherwise read and write the regions");
}

std::shared_ptr<Engine> Engine::create(EngineOptions options) {
  auto engine = std::make_shared<Engine>(std::move(options));
  engine->reactor_.start();
  engine->tcp_->start();
  for (auto& [name, transport] : engine->transports_) transport->start(*engine);
  return engine;
}

Engine::~Engine() { close(); }

bool Engine::allows(std::string_view transport) const {
  const auto& allowed = options_.transports.empty() ? transport_names() : options_.transports;
  return std::ranges::find(allowed, transport) != allowed.end();
}

void Engine::check_open() const {
  if (closed()) fail(Code::kInvalidArgument, "the engine '", options_.name, "' is closed");
}

void Engine::close() noexcept {
  std::lock_guard once(close_mutex_);  // a second caller returns when the first has finished
  if (closed_.exchange(true, std::memory_order_acq_rel)) return;
  const Failure cause{.code = Code::kCancelled, .text = "the engine was closed"};
  std::vector<LeasePtr> leases;
  std::vector<PeerPtr> peers;
  std::vector<LinkPtr> links;
  {
    std::lock_guard lock(mutex_);
    for (auto& [id, lease] : leases_) leases.push_back(lease);
    for (auto& [id, region] : regions_) region->gate.close();
    for (auto& [id, pending] : pending_) links.push_back(pending.second);
    for (auto& [id, peer] : peers_) {
      peers.push_back(peer);
      std::lock_guard inner(peer->mutex);
      links.insert(links.end(), peer->links.begin(), peer->links.end());
    }
  }
  for (auto& lease : leases) begin_revoke(lease);
  for (auto& link : links) {
    link->control->close(cause);  // first: it says goodbye
    for (auto& connection : link->data) connection->close(cause);
  }
  for (auto& peer : peers) kick(peer);  // ends what no connection has
  reactor_.stop();                      // runs what close() posted
  for (auto& link : links) {
    for (auto& connection : link->data) connection->join();
    link->control->join();
  }
  for (auto& [name, transport] : transports_) transport->stop();
  tcp_->stop();
  for (auto& peer : peers) {
    peer->alive.store(false, std::memory_order_release);
    std::vector<TransferPtr> rest;
    {
      std::lock_guard lock(peer->mutex);
      rest.assign(peer->backlog.begin(), peer->backlog.end());
      peer->backlog.clear();
    }
    for (auto& transfer : rest) end(transfer, State::kCancelled, cause, true, true);
    peer->tags_changed.notify_all();
  }
  {
    std::lock_guard lock(mutex_);
    regions_.clear();
    leases_.clear();
    pending_.clear();
    peers_.clear();
  }
  std::vector<Notification> inbox;
  std::vector<PeerEvent> events;
  {
    std::lock_guard lock(inbox_mutex_);
    inbox.swap(inbox_);
    events.swap(events_);
  }
  signal();
}

// ---------------------------------------------------------------- regions

RegionPtr Engine::allocate(uint64_t nbytes, RegionOptions options) {
  check_open();
  check_name("region", options.name);
  if (nbytes == 0) fail(Code::kInvalidArgument, "a region needs at least one byte");
  Segment segment = allocate_segment(nbytes, options.name);
  auto region = std::make_shared<Region>();
  region->name = options.name;
  region->nbytes = nbytes;
  region->require_lease = options.require_lease;
  region->shareable = options.shareable;
  region->pieces = {{segment.base, 0, nbytes}};
  region->backing = std::move(segment.backing);
  region->memfd = std::move(segment.memfd);
  region->keep = std::move(segment.mapping);
  return add_region(std::move(region));
}

RegionPtr Engine::register_pieces(std::vector<Piece> pieces, bool writable,
                                  std::shared_ptr<void> keep, RegionOptions options) {
  check_open();
  check_name("region", options.name);
  auto region = std::make_shared<Region>();
  region->name = options.name;
  region->writable = writable;
  region->require_lease = options.require_lease;
  region->shareable = options.shareable;
  region->keep = std::move(keep);
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].nbytes == 0) fail(Code::kInvalidArgument, "buffer ", i, " is empty");
    pieces[i].offset = region->nbytes;
    region->nbytes += pieces[i].nbytes;
  }
  if (pieces.empty()) fail(Code::kInvalidArgument, "a region needs at least one buffer");
  region->pieces = std::move(pieces);
  return add_region(std::move(region));
}

RegionPtr Engine::add_region(RegionPtr region) {
  region->key = random_bytes<16>();
  if (words_) region->gate.export_word(words_->take());
  std::lock_guard lock(mutex_);
  check_open();
  if (regions_.size() >= kMaxRegions)
    fail(Code::kRegistration, "more than ", kMaxRegions, " regions");
  for (auto& [id, other] : regions_)
    if (other->name == region->name)
      fail(Code::kInvalidArgument, "a region named '", region->name,
           "' exists; pass another name=");
  region->id = next_id_++;
  regions_.emplace(region->id, region);
  for (auto& [name, transport] : transports_) transport->expose(region);
  broadcast(RegionAdded{{region->id, region->key}, region->nbytes, region->writable, region->name});
  return region;
}

void Engine::deregister(const RegionPtr& region) {
  std::vector<LeasePtr> leases;
  {
    std::lock_guard lock(mutex_);
    auto it = regions_.find(region->id);
    if (it == regions_.end() || it->second != region) {
      if (region->gate.closed()) return;  // again: harmless
      fail(Code::kInvalidArgument, "region '", region->name, "' belongs to another engine");
    }
    if (const uint64_t uses = region->uses.load(); uses != 0)
      fail(Code::kInvalidArgument, "region '", region->name, "' is in use by ", uses,
           " transfer(s) that have not quiesced; wait for them or cancel them first");
    regions_.erase(it);
    for (auto& [id, lease] : leases_)
      if (lease->region == region) leases.push_back(lease);
    broadcast(RegionRemoved{region->id});
  }
  region->gate.close();
  for (auto& lease : leases) begin_revoke(lease);
  for (auto& [name, transport] : transports_) transport->withdraw(*region);
}

// ---------------------------------------------------------------- the application's side

void Engine::signal() noexcept {
  if (signalled_.exchange(true, std::memory_order_acq_rel)) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

void Engine::clear_wakeup() noexcept {
  // Drain first, then allow the next write: what is published in between is seen by the caller,
  // who looks after this returns.
  uint64_t count;
  [[maybe_unused]] const ssize_t n = ::read(event_.get(), &count, sizeof count);
  signalled_.exchange(false, std::memory_order_acq_rel);
}

std::vector<Notification> Engine::notifications() {
  std::vector<Notification> out;
  {
    std::lock_guard lock(inbox_mutex_);
    out.swap(inbox_);
  }
  for (auto& notification : out) {
    Peer& peer = *notification.peer;
    std::shared_ptr<tcp::TcpConnection> control;
    uint32_t count = 0;
    {
      std::lock_guard lock(peer.mutex);
      --peer.undrained;
      // In batches: the window is four times as wide, so nobody waits for the rest.
      if (++peer.drained >= kNotifyWindow / 4 && !peer.links.empty()) {
        count = std::exchange(peer.drained, 0);
        control = peer.links.front()->control;
      }
    }
    if (control) control->send_control(encode(Credit{count}));
  }
  return out;
}

std::vector<PeerEvent> Engine::peer_events() {
  std::lock_guard lock(inbox_mutex_);
  return std::exchange(events_, {});
}

uint64_t Engine::arrivals(uint64_t tag, const Peer& peer) const {
  std::lock_guard lock(peer.mutex);
  auto it = peer.tags.find(tag);
  return it == peer.tags.end() ? 0 : it->second;
}

std::map<std::string, RemoteRegionPtr> Engine::regions_of(const Peer& peer) const {
  std::lock_guard lock(peer.mutex);
  return peer.regions;
}

std::string Engine::explain(const Peer& peer) const {
  std::string memory;
  {
    std::lock_guard lock(mutex_);
    for (auto& [id, region] : regions_)
      if (!region->backing.text.empty())
        memory += cat("  our region '", region->name, "': ", region->backing.text, "\n");
  }
  std::lock_guard lock(peer.mutex);
  std::string out = cat("peer '", peer.identity.name, "' at ", peer.identity.address,
                        ", incarnation ", hex(peer.identity.incarnation),
                        peer.alive ? "" : ", lost: ", peer.alive ? "" : peer.lost_because, "\n");
  for (auto& link : peer.links) {
    bool first = true;
    for (auto& connection : link->data) {
      out += cat("  ", first ? "uses " : "falls back to ", connection->describe(), "\n");
      first = false;
    }
    if (!allows("tcp")) out += "  tcp carries control only: transports= leaves it out\n";
    for (auto& refusal : link->refusals) out += cat("  not ", refusal, "\n");
  }
  for (auto& reason : not_here_) out += cat("  not ", reason, "\n");
  return out + memory;
}

void Totals::add(const Counters& c) noexcept {
  bytes_written += c.bytes_written, bytes_read += c.bytes_read, bytes_received += c.bytes_received;
  bytes_served += c.bytes_served, bytes_sunk += c.bytes_sunk, requests += c.requests;
  requests_served += c.requests_served, refused += c.refused;
  notifications_sent += c.notifications_sent, notifications_received += c.notifications_received;
}

void Totals::add(const Totals& t) noexcept {
  bytes_written += t.bytes_written, bytes_read += t.bytes_read, bytes_received += t.bytes_received;
  bytes_served += t.bytes_served, bytes_sunk += t.bytes_sunk, requests += t.requests;
  requests_served += t.requests_served, refused += t.refused;
  notifications_sent += t.notifications_sent, notifications_received += t.notifications_received;
}

EngineStats Engine::stats() const {
  EngineStats out;
  std::lock_guard lock(mutex_);
  out.totals = forgotten_;
  for (auto& [incarnation, peer] : peers_) {
    PeerStats entry{hex(incarnation), peer->identity.name, peer->identity.address, peer->alive, {}};
    {
      std::lock_guard inner(peer->mutex);
      entry.transports = peer->past;
      for (auto& link : peer->links) {
        bool has_control = false;
        for (auto& connection : link->data) {
          entry.transports[std::string(connection->transport())].add(connection->counters);
          has_control |= connection == link->control;
        }
        if (!has_control) entry.transports["tcp"].add(link->control->counters);
      }
    }
    for (auto& [name, totals] : entry.transports) out.totals[name].add(totals);
    out.peers.push_back(std::move(entry));
  }
  out.done = ends_[0], out.failed = ends_[1], out.timed_out = ends_[2], out.cancelled = ends_[3];
  out.in_flight = started_ - out.done - out.failed - out.timed_out - out.cancelled;
  out.late_events = late_events_, out.late_writes_refused = late_writes_,
  out.unquiesced = unquiesced_;
  out.leases_open = leases_.size(), out.leases_expired = expired_,
  out.wakeups = reactor_.num_wakeups();
  out.handshakes_refused = handshakes_refused_;
  out.last_handshake_refusal = last_handshake_refusal_;
  return out;
}

}  // namespace kvxfer
