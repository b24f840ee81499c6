// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How a transfer comes to its one end: completion, cancel, deadline; and what
// its error says.
#include <algorithm>

#include "engine/engine.hpp"
#include "transport/process_state.hpp"

namespace kvxfer {
namespace {

constexpr double kEndingS = 1.0;  // far more than it takes; a bound all the same
constexpr int64_t kLookAgainNs = 100'000'000;

const char* verb(Op op) {
  return op == Op::kWrite ? "write" : op == Op::kRead ? "read" : "notification";
}

const char* hint(const Transfer& t, Code code, bool agreed) {
  switch (code) {
    case Code::kPeerDisconnected:
      return "; connect() again: a restarted peer is a new incarnation with new "
             "regions";
    case Code::kRemoteAccess:
      return "; look at peer.regions again: the owner may have changed them";
    case Code::kLease:
      return t.lease.id == 0 ? "; pass lease=, the token that its owner has granted"
                             : "; ask the owner for a new lease";
    case Code::kTimeout:
      return agreed ? "; a longer deadline_s=, or engine.explain(peer), may help"
                    : "; the target's arrival counts and lease decide";
    case Code::kUnavailable:
      return "; engine.explain(peer) says why each transport does not carry it";
    default:
      return "";
  }
}

std::string describe(const Transfer& t, const Failure& failure, bool agreed, bool quiesced) {
  const PeerIdentity& who = t.peer->identity;
  std::string out = verb(t.op);
  if (t.op != Op::kNotify)
    out += cat(" of ", t.spans.size(), " span(s), ", t.nbytes, " bytes, ",
               t.op == Op::kWrite ? "to" : "from", " region '", t.target->name, "'");
  out += cat(t.op == Op::kNotify ? " to" : " of", " peer '", who.name, "' (", who.address,
             ", incarnation ", hex(who.incarnation).substr(0, 8), ")");
  if (const char* name = t.transport.load()) out += cat(" over ", name);
  out += ": ";
  if (failure.span != kNoSpan) {
    out += cat("span ", failure.span, ": ");
  }
  if (failure.expected != 0 || failure.given != 0)
    out += cat("expected at most ", failure.expected, ", given ", failure.given, ": ");
  out += failure.text;
  if (failure.err != 0) out += cat(" [errno ", failure.err, ", ", errno_text(failure.err), "]");
  if (t.op != Op::kNotify)
    out += cat("; ", t.nbytes_done.load(), " bytes are known to have landed");
  if (!agreed) out += "; the peer may or may not have taken it";
  if (!quiesced) out += "; its local memory must not be reused before xfer.quiesced";
  return out + hint(t, failure.code, agreed);
}

}  // namespace

std::string Engine::stopped(Peer& peer) const {
  std::lock_guard lock(peer.mutex);
  if (const int64_t now = now_ns(); peer.stopped_ns == 0 || now - peer.stopped_ns > kLookAgainNs) {
    peer.stopped = describe_stopped(peer.identity.host, identity_.host);
    peer.stopped_ns = now;
  }
  return peer.stopped;
}

// Of a transfer that was not sent.
std::string Engine::why_it_waits(const Transfer& t) const {
  if (t.state.load(std::memory_order_acquire) == State::kHeld)
    return "what it waits for has not ended";
  {
    std::lock_guard lock(t.peer->mutex);
    if (t.has_notify && !t.holds_credit && t.peer->credits == 0)
      return cat("it was never sent: ", kNotifyWindow,
                 " notifications of ours are unread at the peer or under way, and no more may be");
  }
  return stopped(*t.peer);
}

void Transfer::ring(const std::shared_ptr<Alarm>& self) noexcept {
  if (const auto owner = engine.lock()) owner->late(std::static_pointer_cast<Transfer>(self));
}

void Engine::late(const TransferPtr& t) noexcept { stop(t, State::kTimedOut); }

void Engine::cancel(const TransferPtr& t) noexcept {
  stop(t, State::kCancelled);
  // Another thread may be about to say how it ended, or be inside post() and carry out our wish:
  // both within one call that does not block.
  if (!reactor_.on_thread()) t->wait(deadline_after(kEndingS));
}

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
  Failure failure{.code = why == State::kTimedOut ? Code::kTimeout : Code::kCancelled,
                  .text = why == State::kTimedOut ? "the deadline passed" : "cancelled"};
  const auto add = [&failure](const std::string& cause) {
    if (!cause.empty()) failure.text += cat(": ", cause);
  };
  auto stage = Transfer::Stage::kBacklog;
  if (t->stage.compare_exchange_strong(stage, Transfer::Stage::kGone, std::memory_order_seq_cst)) {
    if (why == State::kTimedOut) add(why_it_waits(*t));
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
    return;
  }
  if (why == State::kTimedOut) {
    std::string cause = stopped(*t->peer);
    if (const std::string condition = t->connection->condition(); !condition.empty())
      cause += cat(cause.empty() ? "" : "; ", condition);
    add(cause);
  }
  end(t, why, std::move(failure), result.agreement == Agreement::kStopped, result.quiesced);
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
  if (state != State::kDone) t->message = describe(*t, failure, agreed, quiesced);
  t->failure = std::move(failure);
  t->agreed = agreed;
  // Agreed and not accepted: the target never showed the notification. Not agreed: Host::unshown or
  // the target's own credit returns it.
  if (state != State::kDone && agreed && return_credit(*t->peer, *t)) kick(t->peer);
  if (!t->parent) ends_[static_cast<size_t>(state) - static_cast<size_t>(State::kDone)]++;
  if (quiesced) {
    come_to_rest(*t);
  } else {
    enter_quarantine(*t);
  }
  std::vector<std::shared_ptr<Watch>> watchers;
  LatchPtr latch;
  {
    std::lock_guard lock(t->mutex);
    latch = t->ended;
    reactor_.cancel(t->timer);
    t->state.store(state, std::memory_order_release);
    watchers.swap(t->watchers);
  }
  t->changed.notify_all();
  for (auto& watcher : watchers) watcher->add(t->id);
  if (latch) state == State::kDone ? latch->open() : latch->fail(t->message);
  if (auto parent = std::move(t->parent)) {
    end(parent, state, t->failure, agreed, true);
    return;
  }
  signal();
}

void Engine::come_to_rest(Transfer& t) noexcept {
  return_room(t);
  if (t.local) t.local->uses.fetch_sub(1);
  t.quiesced.store(true, std::memory_order_release);
}

void Engine::quiesced(Request& request) noexcept {
  auto& t = static_cast<Transfer&>(request);
  come_to_rest(t);
  leave_quarantine(&t);  // after the store: who enters looks at it under the same lock
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
