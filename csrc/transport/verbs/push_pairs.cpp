// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs of pushed writes come and go, rail by rail: the owner's sink, and the writer that is
// joined to it. The first of them are made like any that follow one that failed.
//
//   writer                                             owner
//   ERR, flush, destroy; in doubt: what was in flight
//   kPushBroken      ──────────────────────────►       ERR; what has landed is counted, and told as
//                                                      accepted where it was all; windows freed,
//                                                      destroy
//                    ◄──────────────────────────       kNewSink epoch+1
//   kNewPusher, what is in doubt  ─────────────►       connect
//                    ◄──────────────────────────       kSinkReady, what of that has landed; then
//                                                      windows are bound, and their keys told
//   the rest is posted again
#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {
std::string VerbsConnection::refuse_push(const Devices& devices) {
  const uint32_t messages = Channel::num_entries(Channel::num_buffers(devices));
  for (const auto& device : devices) {
    const uint32_t needed = Rails::num_entries(*device, messages, true);
    if (needed > static_cast<uint32_t>(device->limits().max_cqe))
      return cat(device->name(), " has completion queues of at most ", device->limits().max_cqe,
                 " entries; with pushes a connection needs ", needed);
  }
  return {};
}

bool VerbsConnection::on_push_message(Type type, ByteView body) {
  if (type == Type::kAskWindow) return on_ask_window(body);
  if (!why_no_push_.empty()) return false;  // nothing comes to who has asked for nothing
  switch (type) {
    case Type::kWindow:
      return outgoing_.on_window(body);
    case Type::kWindowKey:
      return outgoing_.on_window_key(body);
    case Type::kNoWindow:
      return outgoing_.on_no_window(body);
    case Type::kRevoke:
      return outgoing_.on_revoke(body);
    case Type::kDrained:
      return windows_.on_drained(body);
    case Type::kPushBroken: {
      Reader reader(body);
      const auto head = reader.get<QpHead>();
      if (!reader.finished() || head.rail >= rails_.size()) return false;
      Rail& rail = rails_[head.rail];
      // One that was sent before our kNewSink arrived is answered by that.
      if (head.epoch == rail.push->epoch && head.epoch > 0) rail.push->sink_failed = true;
      return true;
    }
    case Type::kNewSink:
      return on_new_sink(body);
    case Type::kNewPusher:
      return on_new_pusher(body);
    case Type::kSinkReady:
      return on_sink_ready(body);
    case Type::kPushCredit: {
      Reader reader(body);
      const auto head = reader.get<SinkHead>();
      if (!reader.finished() || head.rail >= rails_.size()) return false;
      PushEnds& push = *rails_[head.rail].push;
      if (head.epoch == push.peer_epoch) push.credit = head.posted;
      return true;
    }
    default:
      return false;
  }
}

// ---------------------------------------------------------------- the writer

void VerbsConnection::on_written(Rail& rail, const ibv_wc& completion) {
  PushEnds& push = *rail.push;
  ChainQueue::Outcome outcome = push.writes.on_completion(completion);
  if (completion.status != IBV_WC_SUCCESS && outcome.is_mine) push.failed = true;
  if (!outcome.done) return;
  if (outcome.status != IBV_WC_SUCCESS) {
    // Its source may be read until the queue pair is gone.
    push.flushed.emplace_back(std::move(outcome.done), outcome.status);
    return;
  }
  push.num_breaks = 0;
  push.num_chains.fetch_add(1, std::memory_order_relaxed);
  push.num_bytes.fetch_add(outcome.done->nbytes(), std::memory_order_relaxed);
  outgoing_.on_pushed(std::move(outcome.done));
}

void VerbsConnection::stop_writer(Rail& rail) {
  PushEnds& push = *rail.push;
  push.in_use.store(false, std::memory_order_relaxed);
  if (!push.writes.is_open()) return;
  if (push.writes.stop()) drain(rail, {push.writes.marker()});
  std::deque<ChunkPtr> rest = push.writes.close();
  push.failed = false;
  outgoing_.forget_keys(rail);
  for (auto& [chunk, status] : std::exchange(push.flushed, {}))
    outgoing_.on_doubt(rail, std::move(chunk), status);
  for (ChunkPtr& chunk : rest) outgoing_.on_doubt(rail, std::move(chunk), IBV_WC_WR_FLUSH_ERR);
}

void VerbsConnection::break_writer(Rail& rail, Why why, const std::string& what) {
  PushEnds& push = *rail.push;
  if (!push.writes.is_open()) return;
  stop_writer(rail);
  if (why == Why::kFailed) note_break(rail, what);
  ask_for_sink(rail);
}

void VerbsConnection::note_break(Rail& rail, const std::string& what) {
  ++rail.push->num_breaks;
  rail.last_error = what;
  if (std::ranges::all_of(rails_, [](const auto& each) { return each->push->is_given_up(); }))
    outgoing_.give_up_pushing({.code = Code::kTransport,
                               .text = cat("no rail is left for pushed writes; rail ", rail.number,
                                           ", ", rail.device->name(), ": it has failed ",
                                           rail.push->num_breaks, " times, at last: ", what)});
}

// Also where this rail is not used again for a while, or at all: the old sink has to go, and what
// is in doubt to be answered.
void VerbsConnection::ask_for_sink(Rail& rail) {
  const QpHead head{static_cast<uint32_t>(rail.number), rail.push->peer_epoch, 0, 0};
  channel_.message(Type::kPushBroken, {view_of(head)});
}

bool VerbsConnection::on_new_sink(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<QpHead>();
  if (!reader.finished() || head.rail >= rails_.size()) return false;
  Rail& rail = rails_[head.rail];
  PushEnds& push = *rail.push;
  if (head.epoch != push.peer_epoch + 1) return false;
  push.peer_epoch = head.epoch;
  if (head.epoch > 1) push.num_replaced.fetch_add(1, std::memory_order_relaxed);
  host_.reactor().cancel(std::exchange(push.retry, Reactor::kNoTimer));
  const bool never_ready = push.writes.is_open() && !push.writes.is_ready() && !push.failed;
  stop_writer(rail);
  QpHead answer{head.rail, head.epoch, 0, 0};
  if (std::exchange(push.absent, head.number == 0) && !push.absent) push.num_breaks = 0;
  if (push.absent)
    note_break(rail, "the peer has no queue pair for pushed writes on it");
  else if (never_ready)
    note_break(rail, "the peer could not connect its queue pair for pushed writes");
  const bool pauses = !std::exchange(push.rested, false) && push.num_breaks > 1;
  if (head.number != 0 && !rail.down && !pauses) {
    try {
      const QpEnd fresh = push.writes.open();
      push.writes.connect(rail.route, {head.number, head.psn}, 0);
      answer.number = fresh.number;
      answer.psn = fresh.psn;
      push.writer.store(fresh.number, std::memory_order_relaxed);
    } catch (const Error& error) {
      (void)push.writes.close();  // on which nothing was posted
      note_break(rail, error.what());
    }
  }
  std::vector<uint32_t> in_doubt;
  for (const auto& [chunk, status] : push.in_doubt) in_doubt.push_back(chunk->immediate);
  channel_.message(Type::kNewPusher,
                   {view_of(answer), view_of(std::span<const uint32_t>(in_doubt))});
  if (answer.number == 0 && !rail.down && !push.is_given_up()) {
    const int64_t pause_ns = Rails::kFirstPauseNs << std::min(push.num_breaks, 5u);
    push.retry = host_.reactor().at(now_ns() + pause_ns, [weak = weak_from_this(), &rail] {
      auto self = std::static_pointer_cast<VerbsConnection>(weak.lock());
      if (!self || self->is_dead()) return;
      rail.push->rested = true;
      self->ask_for_sink(rail);
    });
  }
  return true;
}

bool VerbsConnection::on_sink_ready(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<SinkHead>();
  std::vector<uint32_t> held;
  if (!reader.ok() || head.rail >= rails_.size() ||
      !read_numbers(reader, PushEnds::kMaxInDoubt, held))
    return false;
  Rail& rail = rails_[head.rail];
  PushEnds& push = *rail.push;
  if (head.epoch != push.peer_epoch) return true;  // it was replaced since, and asked again
  if (head.ready != 0 && push.writes.is_open()) {
    push.credit = head.posted;
    push.num_posted = 0;
    push.writes.start();
    push.in_use.store(true, std::memory_order_relaxed);
  }
  outgoing_.on_known(rail, held);
  return true;
}

// Any request that was cancelled and is not quiet: our NIC still has chains of it, or nobody knows.
void VerbsConnection::check_pushes() {
  for (const auto& rail : rails_) {
    outgoing_.bury(*rail);
    if (std::ranges::any_of(rail->push->writes.in_flight(), [&](const ChunkPtr& chunk) {
          return outgoing_.is_dead_push(*chunk);
        })) {
      break_writer(*rail, Why::kWanted, {});
      outgoing_.bury(*rail);
    }
    if (is_dead()) return;
  }
  host_.reactor().attend(self());  // for what was held while it flushed
}

bool VerbsConnection::step_pushes() {
  if (look_at_gates_.load(std::memory_order_relaxed)) look_at_windows();
  bool some = false;
  for (const auto& rail : rails_) {
    PushEnds& push = *rail->push;
    if (push.sink.is_connected() && push.sink.credit_due())
      tell_credit(*rail, Type::kPushCredit, {});
    if (push.sink.is_open() && push.sink.error() != 0) {
      rail->last_error = cat("a post for pushed writes failed: ", errno_text(push.sink.error()));
      replace_sink(*rail);
      some = true;
    }
    if (const int err = push.writes.post_error(); err != 0 && push.writes.is_open()) {
      break_writer(*rail, Why::kFailed, cat("ibv_post_send(RDMA_WRITE) failed: ", errno_text(err)));
      some = true;
    }
    if (is_dead()) return true;
  }
  return outgoing_.push_one() || some;
}

}  // namespace kvxfer::verbs
