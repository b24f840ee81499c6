// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine's life, and what the application takes from it.
#include "engine/engine.hpp"

#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>

#include "common/random.hpp"

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

}  // namespace

Engine::Engine(EngineOptions options)
    : options_(std::move(options)), reactor_(options_.transport.spin_ns) {
  watch_forks();
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
  // tcp's copies are the kernel's.
  if (const int n = CopyPool::threads_for(options_.transport.copy_threads);
      n > 0 && !transports_.empty())
    copy_pool_ = std::make_shared<CopyPool>(n);
  tcp_ = std::make_unique<tcp::TcpTransport>(*this, options_.secret, options_.transport);
  bool loopback = true;
  identity_.address = tcp_->listen(options_.listen, &loopback);
  if (!loopback && !options_.secret_is_explicit)
    fail(Code::kInvalidArgument, "listening on ", identity_.address,
         ", which is not loopback, needs an explicit ",
         "secret=: anyone who can reach it could otherwise read and write the "
         "regions");
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

void Engine::check_here() const {
  if (!here())
    fail(Code::kInvalidArgument, "the engine '", options_.name,
         "' lives in the process that this one was forked from; make an engine "
         "here, or start "
         "processes by spawn");
}

void Engine::check_open() const {
  check_here();
  if (closed()) fail(Code::kInvalidArgument, "the engine '", options_.name, "' is closed");
}

void Engine::close() noexcept {
  if (!here()) return;                 // its threads and descriptors are the parent's
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

// ---------------------------------------------------------------- the application's side

void Engine::signal() noexcept {
  if (signalled_.exchange(true, std::memory_order_acq_rel)) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
  woke_somebody = true;
}

void Engine::clear_wakeup() noexcept {
  // Drain first, then allow the next write: what is published in between is seen by the caller,
  // who looks after this returns.
  uint64_t count;
  [[maybe_unused]] const ssize_t n = ::read(event_.get(), &count, sizeof count);
  signalled_.exchange(false, std::memory_order_acq_rel);
  rest();  // who calls this is going to sleep on the eventfd
}

std::vector<Notification> Engine::notifications() {
  std::vector<Notification> out;
  const auto take = [&] {
    std::lock_guard lock(inbox_mutex_);
    out.swap(inbox_);
    return !out.empty();
  };
  if (!take()) {
    poll();
    take();
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
    if (control) control->send_control_now(encode(Credit{count}));
  }
  return out;
}

std::vector<PeerEvent> Engine::peer_events() {
  const auto take = [this] {
    std::lock_guard lock(inbox_mutex_);
    return std::exchange(events_, {});
  };
  auto out = take();
  if (!out.empty()) return out;
  poll();
  return take();
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

}  // namespace kvxfer
