// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The initiator's side, from arguments to a posted request; ends.cpp goes on
// from there.
#include <algorithm>

#include "engine/engine.hpp"

namespace kvxfer {
namespace {
constexpr size_t kMaxCause = 400;  // a chain of causes would grow with its length
}  // namespace

std::optional<std::string> refusal_of(const Connection& connection, const Request& request,
                                      const RemoteRegion* target) {
  if (!connection.reaches_gpus()) {
    if (request.local && request.local->is_on_gpu())
      return cat("it copies by the CPU, and our region '", request.local->name, "' is memory of ",
                 device_text(request.local->device));
    if (target != nullptr && target->device != kHostMemory)
      return cat("it copies by the CPU, and the peer's region '", target->name, "' is memory of ",
                 device_text(target->device));
  }
  return connection.refuses(request);
}

TransferPtr Engine::make_transfer(Op op, const PeerPtr& peer, SubmitOptions& options) {
  auto t = std::make_shared<Transfer>();
  t->id = next_request_.fetch_add(1, std::memory_order_relaxed);
  t->op = op;
  t->engine = weak_from_this();
  t->peer = peer;
  t->deadline_ns = options.deadline_ns;
  t->after = std::move(options.after);
  t->has_notify = options.has_notify;
  t->notify = std::move(options.notify);
  t->has_arrival = options.has_arrival;
  t->arrival = options.arrival;
  if (t->has_notify && t->notify.size() > kMaxNotificationBytes)
    fail(Code::kInvalidArgument, "a notification of ", t->notify.size(), " bytes is longer than ",
         kMaxNotificationBytes, "; write it into a region instead");
  if (options.has_lease) {
    const auto token = decode_token(options.lease);
    if (!token)
      fail(Code::kInvalidArgument, "lease= is not a lease token (", options.lease.size(),
           " bytes)");
    if (token->owner != peer->identity.incarnation)
      throw Error(Code::kLease,
                  cat("the lease was granted by incarnation ", hex(token->owner).substr(0, 8),
                      ", but peer '", peer->identity.name, "' is incarnation ",
                      hex(peer->identity.incarnation).substr(0, 8),
                      ": it belongs to another engine, or to one that has restarted"),
                  0, {}, peer->identity.name);
    t->lease = token->lease;
  }
  return t;
}

// Both counts first, the look second, so that no two threads together pass a limit.
void Engine::take_room(Transfer& t) {
  Peer& peer = *t.peer;
  t.num_spans_counted = t.spans.size();
  t.is_counted = true;
  const uint64_t others = peer.num_pending.fetch_add(1, std::memory_order_relaxed);
  const uint64_t spans =
      peer.num_pending_spans.fetch_add(t.num_spans_counted, std::memory_order_relaxed);
  const uint64_t most = options_.transport.max_pending;
  const uint64_t most_spans = options_.transport.max_pending_spans;
  if (others == 0) return;  // alone, it may be as large as it likes
  if (others < most && spans + t.num_spans_counted <= most_spans) return;
  return_room(t);
  throw Error(
      Code::kBackPressure,
      cat("peer '", peer.identity.name, "' has ", others, " transfers of ours, with ", spans,
          " spans, that have not ended (or were cancelled and may still touch our memory), "
          "and ",
          most, " transfers with ", most_spans,
          " spans is the most: wait for some of them, then offer this one, of ",
          t.num_spans_counted, " spans, again (EngineConfig.max_pending, max_pending_spans)"),
      0, {}, peer.identity.name);
}

void Engine::return_room(Transfer& t) noexcept {
  if (!std::exchange(t.is_counted, false)) return;
  t.peer->num_pending.fetch_sub(1, std::memory_order_relaxed);
  t.peer->num_pending_spans.fetch_sub(t.num_spans_counted, std::memory_order_relaxed);
}

// Counts the transfer into its region, unless it is refused before it begins.
class Engine::Use {
 public:
  Use(const Engine& engine, Region& region) : region_(region) {
    region.uses.fetch_add(1, std::memory_order_seq_cst);
    if (region.owner == &engine && !region.leaving.load(std::memory_order_seq_cst)) return;
    region.uses.fetch_sub(1);
    fail(Code::kInvalidArgument, "local region '", region.name,
         "' is not registered with this engine");
  }
  ~Use() {
    if (!kept_) region_.uses.fetch_sub(1);
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  void keep() noexcept { kept_ = true; }

 private:
  Region& region_;
  bool kept_ = false;
};

TransferPtr Engine::submit(Op op, const RegionPtr& local, const RemoteRegionPtr& remote,
                           const Arguments& arguments, SubmitOptions options) {
  check_open();
  PeerPtr peer = remote->peer.lock();
  if (!peer)
    fail(Code::kInvalidArgument, "remote region '", remote->name,
         "' belongs to an engine that is gone");
  Use use(*this, *local);
  check_reached(*local);
  if (peer->owner != this)
    fail(Code::kInvalidArgument, "remote region '", remote->name,
         "' is of a peer of another engine");
  if (op == Op::kWrite && !remote->writable)
    fail(Code::kInvalidArgument, "remote region '", remote->name,
         "' is read-only and cannot be a destination");
  if (op == Op::kRead && !local->writable)
    fail(Code::kInvalidArgument, "local region '", local->name,
         "' is read-only and cannot be a destination");
  const Bounds bounds{.local_name = local->name,
                      .remote_name = remote->name,
                      .local_nbytes = local->nbytes,
                      .remote_nbytes = remote->nbytes,
                      .destination_is_remote = op == Op::kWrite};
  Expanded expanded = std::visit([&](const auto& each) { return expand(each, bounds); }, arguments);
  TransferPtr t = make_transfer(op, peer, options);
  t->local = local;
  t->remote = remote->ref;
  t->target = remote;
  t->nbytes = expanded.nbytes;
  spans_given_.fetch_add(expanded.num_given, std::memory_order_relaxed);
  spans_posted_.fetch_add(expanded.spans.size(), std::memory_order_relaxed);
  t->spans = std::move(expanded.spans);
  if (op == Op::kRead && (t->has_notify || t->has_arrival)) {
    // "I have read it": sent when the bytes are here, as a transfer of its own.
    auto after = std::make_shared<Transfer>();
    after->id = next_request_.fetch_add(1, std::memory_order_relaxed);
    after->op = Op::kNotify;
    after->engine = weak_from_this();
    after->peer = peer;
    after->lease = t->lease;
    after->has_notify = std::exchange(t->has_notify, false);
    after->notify = std::move(t->notify);
    after->has_arrival = std::exchange(t->has_arrival, false);
    after->arrival = t->arrival;
    t->follow_up = std::move(after);
  }
  take_room(*t);
  use.keep();
  launch(t);
  return t;
}

TransferPtr Engine::notify(const PeerPtr& peer, SubmitOptions options) {
  check_open();
  if (peer->owner != this)
    fail(Code::kInvalidArgument, "peer '", peer->identity.name, "' is not a peer of this engine");
  TransferPtr t = make_transfer(Op::kNotify, peer, options);
  take_room(*t);
  launch(t);
  return t;
}

void Engine::launch(const TransferPtr& t) {
  if (!t->parent) started_.fetch_add(1, std::memory_order_relaxed);
  if (t->deadline_ns != kNever) {
    std::lock_guard lock(t->mutex);  // it may fire before at() has returned
    t->timer = reactor_.at(t->deadline_ns, std::weak_ptr<Alarm>(t));
  }
  if (t->after) {
    t->state.store(State::kHeld,
                   std::memory_order_release);  // before anybody may let it go
    if (!t->after->hold(t)) let_go(t);
  }
  {
    std::lock_guard lock(t->peer->mutex);
    t->peer->backlog.push_back(t);
  }
  kick(t->peer);
}

// On the progress thread: whoever opens a latch, perhaps a callback of CUDA, has other work, and a
// chain of transfers that fail one after the other must not be a recursion.
void Engine::let_go(const TransferPtr& transfer) noexcept {
  reactor_.post([t = transfer, self = weak_from_this()] {
    auto engine = self.lock();
    if (!engine) return;
    auto stage = Transfer::Stage::kBacklog;
    State held = State::kHeld;
    if (const auto why = t->after->failed()) {
      if (t->stage.compare_exchange_strong(stage, Transfer::Stage::kGone,
                                           std::memory_order_seq_cst))
        engine->end(t, State::kCancelled,
                    {.code = Code::kCancelled,
                     .text = cat("what it waited for failed: ", why->substr(0, kMaxCause))},
                    true, true);
    } else {
      t->state.compare_exchange_strong(held, State::kQueued, std::memory_order_acq_rel);
    }
    engine->kick(t->peer);
  });
}

// One thread at a time hands the backlog over, so that order is kept and a request that met
// back-pressure cannot miss the moment when there is room again.
void Engine::kick(const PeerPtr& peer) noexcept {
  std::unique_lock lock(peer->mutex);
  if (peer->kicking) {
    peer->kick_again = true;
    return;
  }
  peer->kicking = true;
  do {
    peer->kick_again = false;
    for (size_t i = 0; i < peer->backlog.size();) {
      TransferPtr t = peer->backlog[i];
      const bool alive = peer->alive && !closed() && t->stage.load() == Transfer::Stage::kBacklog;
      if (alive && t->state.load(std::memory_order_acquire) == State::kHeld) {
        ++i;  // others may pass it
        continue;
      }
      if (alive && t->has_notify && !t->holds_credit) {
        if (peer->credits == 0) {  // others, without a notification, may pass it
          ++i;
          continue;
        }
        --peer->credits;
        t->holds_credit = true;
      }
      peer->backlog.erase(peer->backlog.begin() + static_cast<ptrdiff_t>(i));
      lock.unlock();
      const Posted result = post_one(*peer, t);
      lock.lock();
      if (result == Posted::kBusy) {
        peer->backlog.insert(
            peer->backlog.begin() + static_cast<ptrdiff_t>(std::min(i, peer->backlog.size())), t);
        break;
      }
    }
  } while (peer->kick_again);
  peer->kicking = false;
}

Engine::Posted Engine::post_one(Peer& peer, const TransferPtr& t) noexcept {
  auto waiting = Transfer::Stage::kBacklog;
  if (!t->stage.compare_exchange_strong(waiting, Transfer::Stage::kPosting)) {
    return_credit(peer, *t);
    return Posted::kGone;  // cancelled while it waited
  }
  if (t->op == Op::kRead && t->spans.empty()) {  // it has nothing to ask for
    t->stage.store(Transfer::Stage::kOn, std::memory_order_seq_cst);
    completed(t, {});
    return Posted::kGone;
  }
  std::shared_ptr<Connection> chosen;
  std::string reasons;
  if (!closed()) {
    std::lock_guard lock(peer.mutex);
    for (auto& link : peer.links) {
      for (auto& connection : link->data) {
        auto refusal = refusal_of(*connection, *t, t->target.get());
        if (!refusal) {
          chosen = connection;
          break;
        }
        reasons += cat(reasons.empty() ? "" : "; ", connection->transport(), ": ", *refusal);
      }
      if (chosen) break;
    }
    if (!chosen && peer.links.empty())
      reasons = peer.lost_because.empty() ? "the peer is gone" : peer.lost_because;
  }
  Status status{Code::kPeerDisconnected};
  if (chosen) {
    t->connection = chosen;
    t->transport.store(chosen->transport().data(), std::memory_order_release);
    status = chosen->post(t);
    if (status.code == Code::kAgain) {
      t->stage.store(Transfer::Stage::kBacklog, std::memory_order_seq_cst);
      if (const State why = t->cancel_wanted.load(std::memory_order_seq_cst); why != State::kQueued)
        stop(t, why);
      return Posted::kBusy;
    }
  }
  if (!status.ok()) {
    t->stage.store(Transfer::Stage::kGone, std::memory_order_seq_cst);
    if (closed()) {
      end(t, State::kCancelled, {.code = Code::kCancelled, .text = "the engine was closed"}, true,
          true);
    } else {
      const bool gone = chosen || !peer.alive;
      const bool on_gpu =
          (t->local && t->local->is_on_gpu()) || (t->target && t->target->device != kHostMemory);
      if (!gone && on_gpu)
        reasons += cat(reasons.empty() ? "" : "; ",
                       "a GPU's memory goes over verbs alone: name it, without what is preferred "
                       "to it, in transports= of both engines, or copy through host memory");
      if (reasons.empty())
        reasons = gone ? "the connection has ended"
                       : "no transport joins the two that both may use (transports=)";
      end(t, State::kFailed,
          {.code = gone ? Code::kPeerDisconnected : Code::kUnavailable,
           .err = status.err,
           .text = reasons},
          true, true);
    }
    return Posted::kGone;
  }
  if (t->has_notify) chosen->counters.notifications_sent.fetch_add(1, std::memory_order_relaxed);
  t->stage.store(Transfer::Stage::kOn, std::memory_order_seq_cst);
  if (const State why = t->cancel_wanted.load(std::memory_order_seq_cst); why != State::kQueued)
    stop(t, why);
  return Posted::kGone;
}

}  // namespace kvxfer
