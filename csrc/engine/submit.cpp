// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The initiator's side: from arguments to a posted request, and to its one end.
#include <algorithm>

#include "engine/engine.hpp"

namespace kvxfer {
namespace {

const char* verb(Op op) {
  return op == Op::kWrite ? "write" : op == Op::kRead ? "read" : "notification";
}

const char* hint(Code code) {
  switch (code) {
    case Code::kPeerDisconnected:
      return "; connect() again: a restarted peer is a new incarnation with new regions";
    case Code::kLease:
      return "; ask the owner for a new lease";
    case Code::kTimeout:
      return "; it may or may not have landed: the target's arrival counts and lease decide";
    default:
      return "";
  }
}

std::string describe(const Transfer& t, const Failure& failure) {
  const PeerIdentity& who = t.peer->identity;
  std::string out = verb(t.op);
  if (t.op != Op::kNotify)
    out += cat(" of ", t.spans.size(), " span(s), ", t.nbytes, " bytes, ",
               t.op == Op::kWrite ? "to" : "from", " region '", t.remote_name, "'");
  out += cat(" of peer '", who.name, "' (", who.address, ", incarnation ",
             hex(who.incarnation).substr(0, 8), ")");
  if (const char* name = t.transport.load()) out += cat(" over ", name);
  out += ": ";
  if (failure.span != kNoSpan) {
    out += cat("span ", failure.span, ": ");
    if (failure.expected != 0 || failure.given != 0)
      out += cat("expected at most ", failure.expected, ", given ", failure.given, ": ");
  }
  out += failure.text;
  if (failure.err != 0) out += cat(" [errno ", failure.err, "]");
  return out + hint(failure.code);
}

}  // namespace

TransferPtr Engine::make_transfer(Op op, const PeerPtr& peer, SubmitOptions& options) {
  auto t = std::make_shared<Transfer>();
  t->id = next_request_.fetch_add(1, std::memory_order_relaxed);
  t->op = op;
  t->engine = weak_from_this();
  t->peer = peer;
  t->deadline_ns = options.deadline_ns;
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

TransferPtr Engine::submit(Op op, const RegionPtr& local, const RemoteRegionPtr& remote,
                           const SpanArguments& arguments, SubmitOptions options) {
  check_open();
  PeerPtr peer = remote->peer.lock();
  if (!peer)
    fail(Code::kInvalidArgument, "remote region '", remote->name,
         "' belongs to an engine that is gone");
  {
    std::lock_guard lock(mutex_);
    auto it = regions_.find(local->id);
    if (it == regions_.end() || it->second != local)
      fail(Code::kInvalidArgument, "local region '", local->name,
           "' is not registered with this engine");
    auto mine = peers_.find(peer->identity.incarnation);
    if (mine == peers_.end() || mine->second != peer)
      fail(Code::kInvalidArgument, "remote region '", remote->name,
           "' is of a peer of another engine");
  }
  if (op == Op::kWrite && !remote->writable)
    fail(Code::kInvalidArgument, "remote region '", remote->name,
         "' is read-only and cannot be a destination");
  if (op == Op::kRead && !local->writable)
    fail(Code::kInvalidArgument, "local region '", local->name,
         "' is read-only and cannot be a destination");
  Expanded expanded = expand(arguments, {.local_name = local->name,
                                         .remote_name = remote->name,
                                         .local_nbytes = local->nbytes,
                                         .remote_nbytes = remote->nbytes,
                                         .destination_is_remote = op == Op::kWrite});
  TransferPtr t = make_transfer(op, peer, options);
  t->local = local;
  t->remote = remote->ref;
  t->remote_name = remote->name;
  t->spans = std::move(expanded.spans);
  t->nbytes = expanded.nbytes;
  if (op == Op::kRead && (t->has_notify || t->has_arrival)) {
    // "I have read it": sent when the bytes are here, as a transfer of its own.
    auto after = std::make_shared<Transfer>();
    after->id = next_request_.fetch_add(1, std::memory_order_relaxed);
    after->op = Op::kNotify;
    after->engine = weak_from_this();
    after->peer = peer;
    after->remote_name = t->remote_name;
    after->lease = t->lease;
    after->has_notify = std::exchange(t->has_notify, false);
    after->notify = std::move(t->notify);
    after->has_arrival = std::exchange(t->has_arrival, false);
    after->arrival = t->arrival;
    t->follow_up = std::move(after);
  }
  launch(t);
  return t;
}

TransferPtr Engine::notify(const PeerPtr& peer, SubmitOptions options) {
  check_open();
  {
    std::lock_guard lock(mutex_);
    auto mine = peers_.find(peer->identity.incarnation);
    if (mine == peers_.end() || mine->second != peer)
      fail(Code::kInvalidArgument, "peer '", peer->identity.name, "' is not a peer of this engine");
  }
  TransferPtr t = make_transfer(Op::kNotify, peer, options);
  launch(t);
  return t;
}

void Engine::launch(const TransferPtr& t) {
  if (t->local) t->local->uses.fetch_add(1);
  if (!t->parent) started_.fetch_add(1, std::memory_order_relaxed);
  // A read of nothing has nothing to ask for.
  if (t->op == Op::kRead && t->spans.empty()) {
    t->stage.store(Transfer::Stage::kOn, std::memory_order_seq_cst);
    completed(t, {});
    return;
  }
  if (t->deadline_ns != kNever) {
    std::lock_guard lock(t->mutex);  // it may fire before at() has returned
    t->timer = reactor_.at(t->deadline_ns, [weak = std::weak_ptr(t), self = weak_from_this()] {
      auto engine = self.lock();
      auto transfer = weak.lock();
      if (engine && transfer) engine->stop(transfer, State::kTimedOut);
    });
  }
  {
    std::lock_guard lock(t->peer->mutex);
    t->peer->backlog.push_back(t);
  }
  kick(t->peer);
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
      const bool alive = peer->alive && !closed() && t->stage.load() == Transfer::Stage::kHeld;
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
  auto held = Transfer::Stage::kHeld;
  if (!t->stage.compare_exchange_strong(held, Transfer::Stage::kPosting)) {
    return_credit(peer, *t);
    return Posted::kGone;  // cancelled while it waited
  }
  std::shared_ptr<Connection> chosen;
  std::string reasons;
  {
    std::lock_guard lock(peer.mutex);
    for (auto& link : peer.links) {
      for (auto& connection : link->data) {
        auto refusal = connection->refuses(*t);
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
      t->stage.store(Transfer::Stage::kHeld, std::memory_order_seq_cst);
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
      if (reasons.empty()) reasons = "the connection has ended";
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

// ---------------------------------------------------------------- ends

void Engine::stop(const TransferPtr& t, State why) noexcept {
  if (t->claimed.load(std::memory_order_acquire)) return;
  // Left for a poster that is inside post(), and for a read whose notification is about to go.
  State none = State::kQueued;
  t->cancel_wanted.compare_exchange_strong(none, why, std::memory_order_seq_cst);
  if (t->follow_up) {
    std::unique_lock lock(t->mutex);
    if (t->following) {
      lock.unlock();
      stop(t->follow_up, why);
      return;
    }
  }
  const Failure failure{.code = why == State::kTimedOut ? Code::kTimeout : Code::kCancelled,
                        .text = why == State::kTimedOut ? "the deadline passed" : "cancelled"};
  auto stage = Transfer::Stage::kHeld;
  if (t->stage.compare_exchange_strong(stage, Transfer::Stage::kGone, std::memory_order_seq_cst)) {
    end(t, why, failure, true, true);  // still ours: it was never sent
    kick(t->peer);                     // drops it from the backlog
    return;
  }
  if (stage != Transfer::Stage::kOn) return;  // the poster sees cancel_wanted, or it has ended
  if (t->cancelling.exchange(true, std::memory_order_acq_rel)) return;
  const Cancelled result = t->connection->cancel(t);
  if (result.agreement == Agreement::kEnding) return;
  if (result.agreement == Agreement::kAlreadyAccepted) {
    t->nbytes_done.store(t->nbytes, std::memory_order_relaxed);
    end(t, State::kDone, {}, true, result.quiesced);
  } else {
    end(t, why, failure, result.agreement == Agreement::kStopped, result.quiesced);
  }
}

void Engine::posted(Request& request) noexcept {
  State queued = State::kQueued;
  static_cast<Transfer&>(request).state.compare_exchange_strong(queued, State::kPosted,
                                                                std::memory_order_acq_rel);
}

void Engine::ended(Connection&, const RequestPtr& request, Completion completion) noexcept {
  completed(std::static_pointer_cast<Transfer>(request), std::move(completion));
}

void Engine::completed(const TransferPtr& t, Completion completion) noexcept {
  if (t->claimed.load(std::memory_order_acquire)) {  // told twice, or too late
    late_events_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  t->nbytes_done.store(completion.nbytes, std::memory_order_relaxed);
  if (t->follow_up) {
    {
      std::lock_guard lock(t->mutex);
      if (t->following) {
        late_events_.fetch_add(1, std::memory_order_relaxed);
        return;
      }
    }
    if (completion.ok && !closed()) {
      t->follow_up->parent = t;
      launch(t->follow_up);
      {
        // Only now: a cancel that stopped it before its launch would end it without us.
        std::lock_guard lock(t->mutex);
        t->following = true;
      }
      if (const State why = t->cancel_wanted.load(std::memory_order_seq_cst); why != State::kQueued)
        stop(t->follow_up, why);
      return;
    }
  }
  // Our goodbye makes the peer hang up, and its end may be heard before our own close gets that
  // far.
  if (!completion.ok && closed() && completion.failure.code == Code::kPeerDisconnected)
    completion.failure = {.code = Code::kCancelled, .text = "the engine was closed"};
  State state = State::kDone;
  if (!completion.ok)
    state = completion.failure.code == Code::kCancelled ? State::kCancelled
            : completion.failure.code == Code::kTimeout ? State::kTimedOut
                                                        : State::kFailed;
  end(t, state, std::move(completion.failure), completion.agreed, true);
}

void Engine::end(const TransferPtr& t, State state, Failure failure, bool agreed,
                 bool quiesced) noexcept {
  if (t->claimed.exchange(true, std::memory_order_acq_rel)) {
    late_events_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (state != State::kDone) t->message = describe(*t, failure);
  t->failure = std::move(failure);
  t->agreed = agreed;
  // Agreed and not accepted: the target never showed the notification. Not agreed: Host::unshown or
  // the target's own credit returns it.
  if (state != State::kDone && agreed && return_credit(*t->peer, *t)) kick(t->peer);
  if (!t->parent) ends_[static_cast<size_t>(state) - static_cast<size_t>(State::kDone)]++;
  if (!quiesced) unquiesced_.fetch_add(1, std::memory_order_relaxed);
  if (quiesced) {
    if (t->local) t->local->uses.fetch_sub(1);
    t->quiesced.store(true, std::memory_order_release);
  }
  std::vector<std::shared_ptr<Watch>> watchers;
  {
    std::lock_guard lock(t->mutex);
    reactor_.cancel(t->timer);
    t->state.store(state, std::memory_order_release);
    watchers.swap(t->watchers);
  }
  t->changed.notify_all();
  for (auto& watcher : watchers) watcher->add(t->id);
  if (auto parent = std::move(t->parent)) {
    end(parent, state, t->failure, agreed, true);
    return;
  }
  signal();
}

void Engine::quiesced(Request& request) noexcept {
  auto& t = static_cast<Transfer&>(request);
  if (t.local) t.local->uses.fetch_sub(1);
  unquiesced_.fetch_sub(1, std::memory_order_relaxed);
  t.quiesced.store(true, std::memory_order_release);
  t.changed.notify_all();
  signal();
}

bool Engine::return_credit(Peer& peer, Transfer& t) noexcept {
  std::lock_guard lock(peer.mutex);
  if (!std::exchange(t.holds_credit, false)) return false;
  peer.credits = std::min(peer.credits + 1, kNotifyWindow);
  return true;
}

void Engine::unshown(Connection&, const Request& request) noexcept {
  auto& t = const_cast<Transfer&>(static_cast<const Transfer&>(request));
  return_credit(*t.peer, t);
  kick(t.peer);
}

void Engine::writable(Connection& from) noexcept {
  if (auto peer = std::static_pointer_cast<Peer>(from.peer.lock())) kick(peer);
}

}  // namespace kvxfer
