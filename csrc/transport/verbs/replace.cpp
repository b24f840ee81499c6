// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs of bulk come and go, rail by rail, while the connection stays.
//
//   source side                                        pulling side
//   ERR, destroy: nothing is read any more             (its READs fail: kPullBroken, or before
//   that) kNewSource epoch+1  ──────────────────────────►    ERR, flush, destroy; chains are kept,
//   and go
//                                                      to other rails
//   connect             ◄──────────────────────────    kNewPuller
//   kSourceReady        ──────────────────────────►    a READ of the peer's incarnation; when it
//   has
//                                                      come, the rail takes chains again
//
// An abort of ours that was sent before kNewSource is acted on before any chain is posted again, so
// a source that was taken away is never read on behalf of what was cancelled.
//
// Whoever has seen its port go says so (kNewSource without a queue pair) and is silent until it has
// come back; whoever has seen nothing but READs that fail asks again, ever more seldom.
#include <algorithm>
#include <bit>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {
namespace {
// How long a cancelled write waits for the owner's word before its source is taken away.
constexpr int64_t kAnswerNs = 200'000'000;
// How long a revocation waits for READs under way before the queue pair is stopped.
constexpr int64_t kGateNs = 250'000'000;
}  // namespace

// ---------------------------------------------------------------- our READs

// What was in flight is kept by its request, to be posted again.
void VerbsConnection::stop_pulls(Rail& rail) {
  if (!rail.pulls.is_open()) return;
  rail.in_use.store(false, std::memory_order_relaxed);
  rail.stopping = true;
  if (rail.pulls.stop()) drain(rail, {rail.pulls.marker()});
  close_pulls(rail);
}

// Destroyed, the queue pair touches nothing any more; only now are gates left.
void VerbsConnection::close_pulls(Rail& rail) {
  std::deque<ChunkPtr> rest = rail.pulls.close();
  for (auto& [chunk, status] : std::exchange(rail.parked, {}))
    deliver(rail, std::move(chunk), status);
  for (ChunkPtr& chunk : rest) deliver(rail, std::move(chunk), IBV_WC_WR_FLUSH_ERR);
  rail.stopping = rail.failed = false;
}

void VerbsConnection::break_pulls(Rail& rail, Why why) {
  if (!rail.pulls.is_open()) return;
  const ibv_wc_status status = rail.pulls.first_error();
  if (why == Why::kFailed) {
    ++rail.num_breaks;
    if (status != IBV_WC_SUCCESS) rail.last_error = api().wc_status_str(status);
  }
  stop_pulls(rail);
  if (is_dead()) return;
  if (why == Why::kWanted) return ask_for_source(rail);
  if (!end_if_none_left(rail)) ask_again(rail);
}

void VerbsConnection::ask_again(Rail& rail) {
  const int64_t pause_ns = rail.pause_ns();
  if (pause_ns == 0) return ask_for_source(rail);
  rail.retry = host_.reactor().at(now_ns() + pause_ns, [weak = weak_from_this(), &rail] {
    auto self = std::static_pointer_cast<VerbsConnection>(weak.lock());
    if (self && !self->is_dead()) self->ask_for_source(rail);
  });
}

void VerbsConnection::ask_for_source(Rail& rail) {
  if (rail.down) return;  // when the port comes back
  channel_.message(Type::kPullBroken,
                   {view_of(QpHead{static_cast<uint32_t>(rail.number), rail.peer_epoch, 0, 0})});
}

// No request is risked on a rail that has not shown that it works.
void VerbsConnection::probe(Rail& rail) {
  ChunkPtr chunk = rails_.new_chunk();
  Keys rkeys{};
  rkeys[rail.number] = rail.remote.word_rkey;
  auto& scratch = outgoing_.scratch(rail);
  scratch = {};
  static_assert(sizeof scratch == sizeof(Incarnation));
  chunk->probe = true;
  chunk->add(peer_word_, rkeys, reinterpret_cast<std::byte*>(scratch.data()),
             outgoing_.scratch_lkeys(), sizeof(Incarnation), 1);
  rail.pulls.post(std::move(chunk), false);
}

void VerbsConnection::on_probed(Rail& rail, ChunkPtr chunk, ibv_wc_status status) {
  rails_.recycle(std::move(chunk));
  if (status != IBV_WC_SUCCESS || is_dead()) return;  // a failure has been noted, like any READ's
  if (std::bit_cast<Incarnation>(outgoing_.scratch(rail)) != peer_) {
    rail.last_error = "what answers at the peer's RDMA address is another engine";
    rail.failed = true;
    return;
  }
  rail.pulls.start();
  rail.in_use.store(true, std::memory_order_relaxed);
  renew_control(rail);
}

void VerbsConnection::on_new_source(Rail& rail, const QpHead& head) {
  if (head.epoch != rail.peer_epoch + 1) return broken("a source out of order");
  rail.peer_epoch = head.epoch;
  rail.absent = head.number == 0;
  host_.reactor().cancel(std::exchange(rail.retry, Reactor::kNoTimer));
  stop_pulls(rail);
  if (is_dead()) return;
  if (rail.absent) {
    // Nor has it one for messages; the next will be told of (kNewControl).
    if (channel_.rail() != rail.number) drop_control(rail);
    rail.last_error = "the peer has no queue pair for it: its port is down, or making one failed";
    ++rail.num_breaks;
    if (!end_if_none_left(rail)) ask_again(rail);
    return;
  }
  if (rail.down) return;
  try {
    const QpEnd fresh = rail.pulls.open();
    rail.puller.store(fresh.number, std::memory_order_relaxed);
    rail.pulls.connect(rail.route, {head.number, head.psn}, rail.issued);
    channel_.message(Type::kNewPuller,
                     {view_of(QpHead{head.rail, head.epoch, fresh.number, fresh.psn})});
  } catch (const Error& error) {
    rail.last_error = error.what();
    break_pulls(rail, Why::kFailed);
  }
}

// True: nothing carries READs any more, and the connection has ended for it.
bool VerbsConnection::end_if_none_left(const Rail& failed) {
  if (rails_.any_left()) return false;
  const bool lost = failed.pulls.first_error() == IBV_WC_RETRY_EXC_ERR;
  std::string text =
      cat("no rail is left; rail ", failed.number, ", ", failed.device->name(), ": ");
  if (failed.num_breaks > 0)
    text += cat("it has failed ", failed.num_breaks, " time(s), at last: ");
  die({.code = lost ? Code::kPeerDisconnected : Code::kTransport,
       .text = text + failed.last_error});
  return true;
}

// ---------------------------------------------------------------- the peer's READs

// What was cancelled is quiesced as soon as no rail leads to our memory.
void VerbsConnection::tell_sources() {
  bool any = false;
  for (const auto& rail : rails_) any |= rail->serving;
  any ? outgoing_.source_there() : outgoing_.source_gone();
}

void VerbsConnection::replace_source(Rail& rail) {
  rail.drop_source();
  rail.source_gone.store(true, std::memory_order_relaxed);
  rail.num_replaced.fetch_add(1, std::memory_order_relaxed);
  ++rail.source_epoch;
  QpHead head{static_cast<uint32_t>(rail.number), rail.source_epoch, 0, 0};
  try {
    rail.make_source();
    head.number = rail.source->qp_num;
    head.psn = rail.source_psn;
  } catch (const Error& error) {
    rail.source.reset();
    rail.last_error = error.what();
  }
  tell_sources();
  channel_.message(Type::kNewSource, {view_of(head)});
}

void VerbsConnection::withdraw_source(Rail& rail) {
  rail.drop_source();
  rail.source_gone.store(true, std::memory_order_relaxed);
  ++rail.source_epoch;
  tell_sources();
  channel_.message(Type::kNewSource,
                   {view_of(QpHead{static_cast<uint32_t>(rail.number), rail.source_epoch, 0, 0})});
}

void VerbsConnection::on_new_puller(Rail& rail, const QpHead& head) {
  if (head.epoch != rail.source_epoch || rail.serving || !rail.source) return;  // overtaken
  try {
    connect_qp(*rail.device, rail.source.get(), rail.route, {head.number, head.psn},
               rail.source_psn, rail.served, 0);
  } catch (const Error& error) {
    rail.last_error = error.what();
    return withdraw_source(rail);
  }
  rail.serving = true;
  rail.source_gone.store(false, std::memory_order_relaxed);
  tell_sources();
  channel_.message(Type::kSourceReady, {view_of(QpHead{head.rail, head.epoch, 0, 0})});
}

void VerbsConnection::on_queue_pairs(Type type, ByteView body) {
  Reader reader(body);
  const auto head = reader.get<QpHead>();
  if (!reader.finished() || head.rail >= rails_.size())
    return broken("a malformed message about queue pairs");
  Rail& rail = rails_[head.rail];
  switch (type) {
    case Type::kPullBroken:
      // One that was sent before our kNewSource arrived is answered by that.
      if (head.epoch == rail.source_epoch && !rail.down) replace_source(rail);
      return;
    case Type::kNewSource:
      return on_new_source(rail, head);
    case Type::kNewPuller:
      return on_new_puller(rail, head);
    case Type::kNewControl:
      return on_new_control(rail, head);
    default:
      if (head.epoch == rail.peer_epoch && rail.pulls.is_open() && !rail.pulls.is_ready())
        probe(rail);
      return;
  }
}

// ---------------------------------------------------------------- events of a device

bool VerbsConnection::on_queue_pair_event(const Device& device, uint32_t number,
                                          const char* event) {
  if (is_dead()) return false;
  for (const auto& rail : rails_) {
    if (rail->device.get() != &device) continue;
    if (channel_.is_mine(rail->number, number)) {
      control_failed(
          *rail, {.code = Code::kTransport,
                  .text = cat("the control queue pair on ", device.name(), " reported: ", event)});
    } else if (rail->pulls.is_mine(number)) {
      rail->last_error = event;
      break_pulls(*rail, Why::kFailed);
      host_.reactor().attend(self());  // for what was held while it flushed
    } else if (rail->source && rail->source->qp_num == number) {
      if (rail->serving) replace_source(*rail);
    } else if (rail->push && rail->push->writes.is_mine(number)) {
      break_writer(*rail, Why::kFailed, event);
      host_.reactor().attend(self());
    } else if (rail->push && rail->push->sink.is_mine(number)) {
      replace_sink(*rail);
      host_.reactor().attend(self());
    } else {
      continue;
    }
    return true;
  }
  return false;
}

void VerbsConnection::on_port_event(const Device& device, bool up, const std::string& event) {
  if (is_dead()) return;
  std::vector<Rail*> concerned;
  for (const auto& rail : rails_)
    if (rail->device.get() == &device && rail->down == up) concerned.push_back(rail.get());
  // First of all of them: messages are not to move from one to the other.
  for (Rail* rail : concerned) {
    rail->last_error = cat("the device ", device.name(), " reported: ", event);
    rail->down = !up;
  }
  for (Rail* rail : concerned) {
    if (up) {
      rail->num_breaks = 0;
      replace_source(*rail);
      ask_for_source(*rail);
      if (rail->push) on_push_port(*rail, true);
    } else {
      host_.reactor().cancel(std::exchange(rail->retry, Reactor::kNoTimer));
      control_failed(*rail, {.code = Code::kTransport, .text = rail->last_error});
      if (is_dead()) return;
      withdraw_source(*rail);
      stop_pulls(*rail);
      if (rail->push && !is_dead()) on_push_port(*rail, false);
      if (is_dead() || end_if_none_left(*rail)) return;
    }
    host_.reactor().attend(self());
  }
}

// ---------------------------------------------------------------- what must not wait for ever

// Any thread, when answers_watched_ has just become true, or is.
void VerbsConnection::watch_answers(int64_t when_ns) {
  host_.reactor().at(when_ns + kAnswerNs, [weak = weak_from_this()] {
    if (auto self = std::static_pointer_cast<VerbsConnection>(weak.lock())) self->check_answers();
  });
}

void VerbsConnection::check_answers() noexcept {
  // First the flag: who cancels from here on watches anew.
  answers_watched_.store(false, std::memory_order_relaxed);
  if (is_dead()) return;
  const int64_t now = now_ns();
  const auto is_late = [&](int64_t since_ns) {
    return since_ns != kNever && now - since_ns >= kAnswerNs;
  };
  // On whichever rail it is read: from all of them it is taken away.
  if (is_late(outgoing_.unanswered_since(false)))
    for (const auto& rail : rails_)
      if (rail->serving) replace_source(*rail);
  if (is_late(outgoing_.unanswered_since(true))) check_pushes();
  if (is_dead()) return;
  const int64_t since_ns =
      std::min(outgoing_.unanswered_since(false), outgoing_.unanswered_since(true));
  if (since_ns != kNever && !answers_watched_.exchange(true, std::memory_order_relaxed))
    watch_answers(since_ns);
}

void VerbsConnection::watch_gates() {
  if (std::exchange(gates_watched_, true)) return;
  gates_timer_ = host_.reactor().at(now_ns() + kGateNs, [weak = weak_from_this()] {
    if (auto self = std::static_pointer_cast<VerbsConnection>(weak.lock())) self->check_gates();
  });
}

void VerbsConnection::check_gates() {
  gates_watched_ = false;
  if (is_dead()) return;
  const int64_t before_ns = now_ns() - kGateNs;
  bool any_in_flight = false;
  for (const auto& rail : rails_) {
    const bool waits = std::ranges::any_of(rail->pulls.in_flight(), [&](const ChunkPtr& chunk) {
      return Incoming::waits_for_gate(*chunk, before_ns);
    });
    if (waits) {
      break_pulls(*rail, Why::kWanted);
      host_.reactor().attend(self());  // for what was held while it flushed
    }
    if (is_dead()) return;
    any_in_flight |= !rail->pulls.is_empty();
  }
  if (any_in_flight) watch_gates();
}

}  // namespace kvxfer::verbs
