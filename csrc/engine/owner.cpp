// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's side: who may touch what, leases, and what becomes visible when a request has landed.
#include <algorithm>

#include "common/hooks.hpp"
#include "common/random.hpp"
#include "common/sha256.hpp"
#include "engine/engine.hpp"

namespace kvxfer {

struct QuietHook {
  static void run(void* context) {
    auto* lease = static_cast<EngineLease*>(context);
    if (auto engine = lease->engine.lock()) {
      engine->leave_quarantine(lease);
      engine->signal();
    }
  }
};

std::optional<Failure> Engine::admit(Connection& from, const Access& access,
                                     Landing& out) noexcept {
  auto failure = judge(from, access, out);
  if (failure) refused_[static_cast<size_t>(failure->code)].fetch_add(1, std::memory_order_relaxed);
  return failure;
}

namespace {
std::optional<Failure> beyond(const Lease& lease, uint64_t arrival) {
  if (arrival < lease.num_arrivals) return {};
  return Failure{.code = Code::kLease,
                 .text = cat("arrival=", arrival, " is not below the lease's num_arrivals=",
                             lease.num_arrivals, ", which is said when it is granted")};
}
}  // namespace

std::optional<Failure> Engine::judge(Connection& from, const Access& access,
                                     Landing& out) noexcept {
  auto peer = std::static_pointer_cast<Peer>(from.peer.lock());
  if (!peer || closed())
    return Failure{.code = Code::kPeerDisconnected, .text = "the engine is closing"};
  // Tcp is there all the same, for control.
  if (!allows(from.transport()))
    return Failure{.code = Code::kUnavailable,
                   .text = cat("the peer takes nothing over ", from.transport(),
                               ": its transports= leaves it out")};
  std::lock_guard lock(mutex_);
  if (access.lease.id != 0) {
    auto it = leases_.find(access.lease.id);
    if (it == leases_.end() || !equal_constant_time(it->second->key, access.lease.key)) {
      late_writes_.fetch_add(1, std::memory_order_relaxed);
      return Failure{.code = Code::kLease,
                     .text =
                         "the lease is not open here: it was revoked, has "
                         "expired, or never was"};
    }
    // The timer that ends it may be late: this process may have been stopped.
    if (now_ns() >= it->second->expires_ns.load(std::memory_order_relaxed))
      return Failure{.code = Code::kLease, .text = "the lease has expired"};
    if (it->second->peer && *it->second->peer != peer->identity.incarnation)
      return Failure{.code = Code::kLease, .text = "the lease was granted to another peer"};
    if (access.arrival)
      if (auto failure = beyond(*it->second, *access.arrival)) return failure;
    out.lease = it->second;
    out.region = it->second->region;
  }
  if (access.op == Op::kNotify) return {};
  auto it = regions_.find(access.region.id);
  if (it == regions_.end() || !equal_constant_time(it->second->key, access.region.key))
    return Failure{.code = Code::kRemoteAccess,
                   .text = "unknown region: deregistered, or of an earlier incarnation"};
  Region& region = *it->second;
  if (out.lease && out.lease->region != it->second)
    return Failure{.code = Code::kLease,
                   .text = cat("the lease is on region '", out.lease->region->name, "', not on '",
                               region.name, "'")};
  if (!out.lease && region.require_lease)
    return Failure{.code = Code::kLease,
                   .text = cat("region '", region.name, "' requires a lease")};
  if (access.op == Op::kWrite && !region.writable)
    return Failure{.code = Code::kRemoteAccess,
                   .text = cat("region '", region.name, "' is read-only")};
  // The initiator knows this, and has refused it before; one that has not sends no byte either.
  if (region.is_on_gpu() && !from.reaches_gpus())
    return Failure{
        .code = Code::kRemoteAccess,
        .text = cat("region '", region.name, "' is memory of ", device_text(region.device),
                    ", and ", from.transport(), " copies by the CPU")};
  out.region = it->second;
  return {};
}

std::optional<Failure> Engine::accept(Connection& from, Landing& landing,
                                      Arrival arrival) noexcept {
  auto peer = std::static_pointer_cast<Peer>(from.peer.lock());
  if (!peer) return Failure{.code = Code::kPeerDisconnected, .text = "the engine is closing"};
  // Inside the gates: after revoke() has returned quiet, no arrival and no notification of the
  // lease shows up either.
  if (!landing.enter()) {
    late_writes_.fetch_add(1, std::memory_order_relaxed);
    Failure failure = landing.closed();
    refused_[static_cast<size_t>(failure.code)].fetch_add(1, std::memory_order_relaxed);
    return failure;
  }
  hooks::reached(hooks::Point::kBeforeAccept);
  auto refuse = [&](Failure failure) {
    landing.leave();
    refused_[static_cast<size_t>(failure.code)].fetch_add(1, std::memory_order_relaxed);
    return std::optional(std::move(failure));
  };
  // Again: a later stripe of a hostile peer may name another index than the first.
  if (arrival.has_arrival && landing.lease)
    if (auto failure = beyond(*landing.lease, arrival.arrival)) return refuse(std::move(*failure));
  {
    std::lock_guard lock(peer->mutex);
    const bool tag = arrival.has_arrival && !landing.lease;
    if (tag && peer->tags.size() >= kMaxTags && !peer->tags.contains(arrival.arrival))
      return refuse({.code = Code::kRemoteAccess,
                     .expected = kMaxTags,
                     .given = arrival.arrival,
                     .text = "too many different arrival tags without a lease; use a tag for "
                             "several transfers, or a lease, whose arrivals are indices"});
    if (arrival.has_notify && peer->undrained >= 2 * kNotifyWindow)
      return refuse({.code = Code::kTransport,
                     .expected = kNotifyWindow,
                     .text = "more notifications than the window allows"});
    // The last question: from here on it is accepted, and the initiator's cancel comes too late.
    if (arrival.commit && !arrival.commit())
      return refuse({.code = Code::kCancelled, .text = "the initiator cancelled it"});
    if (tag) ++peer->tags[arrival.arrival];
    if (arrival.has_notify) ++peer->undrained;
  }
  hooks::reached(hooks::Point::kAfterAccept);
  if (arrival.has_arrival) {
    if (landing.lease)
      landing.lease->arrive(arrival.arrival);
    else
      peer->tags_changed.notify_all();
  }
  if (arrival.has_notify) {
    from.counters.notifications_received.fetch_add(1, std::memory_order_relaxed);
    std::lock_guard lock(inbox_mutex_);
    inbox_.push_back({peer, std::move(arrival.notify)});
  }
  landing.leave();
  if (arrival.has_arrival || arrival.has_notify) signal();
  return {};
}

LeasePtr Engine::grant(const RegionPtr& region, const Column& offsets, const Column& nbytes,
                       double ttl_s, std::optional<Incarnation> peer, uint64_t num_arrivals) {
  if (!(ttl_s > 0)) fail(Code::kInvalidArgument, "ttl_s must be positive, not ", ttl_s);
  if (num_arrivals > (uint64_t{1} << 24))
    fail(Code::kInvalidArgument, "num_arrivals = ", num_arrivals, " is more than 2^24");
  check_reached(*region);
  auto lease = std::make_shared<EngineLease>();
  lease->extents = merge_extents(offsets, nbytes, region->name, region->nbytes);
  if (peer && *peer == identity_.incarnation)
    fail(Code::kInvalidArgument, "peer= is this engine itself; a lease is for a peer of it");
  if (lease->extents.empty()) fail(Code::kInvalidArgument, "a lease needs at least one span");
  lease->key = random_bytes<16>();
  lease->region = region;
  lease->peer = peer;
  lease->num_arrivals = num_arrivals;
  lease->arrivals = std::vector<std::atomic<uint64_t>>((num_arrivals + 63) / 64);
  lease->engine = weak_from_this();
  if (words_) lease->gate.export_word(words_->take());
  lease->gate.on_quiet(&QuietHook::run, lease.get());
  {
    std::lock_guard lock(mutex_);
    check_open();
    auto it = regions_.find(region->id);
    if (it == regions_.end() || it->second != region)
      fail(Code::kInvalidArgument, "region '", region->name,
           "' is not registered with this engine");
    check_quarantine(*region, lease->extents);
    lease->id = next_id_++;
    leases_.emplace(lease->id, lease);
  }
  lease->token = encode_token({identity_.incarnation, {lease->id, lease->key}});
  extend(lease, ttl_s);
  return lease;
}

void Engine::extend(const LeasePtr& lease, double ttl_s) {
  if (!(ttl_s > 0)) fail(Code::kInvalidArgument, "ttl_s must be positive, not ", ttl_s);
  const int64_t deadline_ns = deadline_after(ttl_s);
  std::lock_guard lock(mutex_);
  if (lease->gate.closed() || !leases_.contains(lease->id))
    fail(Code::kLease, "the lease has ended (", lease->expired ? "expired" : "revoked",
         ") and cannot be extended; grant a new one");
  reactor_.cancel(lease->timer);
  lease->expires_ns.store(deadline_ns, std::memory_order_relaxed);
  // The TTL only triggers the owner's own act; nobody else looks at a clock.
  lease->timer = reactor_.at(deadline_ns, [weak = std::weak_ptr(lease), self = weak_from_this()] {
    auto engine = self.lock();
    auto due = weak.lock();
    if (!engine || !due || now_ns() < due->expires_ns.load(std::memory_order_relaxed)) return;
    if (due->gate.closed()) return;
    due->expired.store(true, std::memory_order_relaxed);
    engine->expired_.fetch_add(1, std::memory_order_relaxed);
    engine->begin_revoke(due);
  });
}

void Engine::begin_revoke(const LeasePtr& lease) noexcept {
  lease->gate.close();
  if (!lease->gate.quiet()) {
    enter_quarantine(lease);
    for (auto& [name, transport] : transports_) transport->revoked(*lease);
  }
  {
    std::lock_guard lock(mutex_);
    leases_.erase(lease->id);
    reactor_.cancel(lease->timer);
  }
  lease->arrival_word.notify_all();  // nothing more will arrive: whoever waits must know
}

}  // namespace kvxfer
