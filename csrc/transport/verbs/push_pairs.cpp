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
#include <arpa/inet.h>

#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {
namespace {
// Pauses of a rail whose writer goes on failing; the first time it is tried again at once.
constexpr int64_t kFirstPauseNs = 100'000'000;
// Chains that can be in doubt on one rail: as many as its send queue holds.
constexpr size_t kMaxInDoubt = 4096;
}  // namespace

std::string VerbsConnection::refuse_push(const Devices& devices) {
  for (size_t i = 0; i < devices.size(); ++i) {
    const Device& device = *devices[i];
    const uint32_t messages = i == 0 ? Channel::num_entries(Channel::num_buffers(device)) : 0;
    const uint32_t needed = Rails::num_entries(device, messages, true);
    if (needed > static_cast<uint32_t>(device.limits().max_cqe))
      return cat(device.name(), " has completion queues of at most ", device.limits().max_cqe,
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
      (void)push.writes.stop();
      (void)push.writes.close();
      note_break(rail, error.what());
    }
  }
  std::vector<uint32_t> in_doubt;
  for (const auto& [chunk, status] : push.in_doubt) in_doubt.push_back(chunk->immediate);
  channel_.message(Type::kNewPusher,
                   {view_of(answer), view_of(std::span<const uint32_t>(in_doubt))});
  if (answer.number == 0 && !rail.down && !push.is_given_up()) {
    const int64_t pause_ns = kFirstPauseNs << std::min(push.num_breaks, 5u);
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
  if (!reader.ok() || head.rail >= rails_.size() || !read_numbers(reader, kMaxInDoubt, held))
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

// ---------------------------------------------------------------- the owner's sinks

bool VerbsConnection::on_ask_window(ByteView body) {
  std::string why_not = why_no_push_;
  if (why_not.empty()) (void)make_sinks(why_not);
  return windows_.on_ask(body, why_not);
}

// Once. False, with the reason: there is none on any rail.
bool VerbsConnection::make_sinks(std::string& why_not) {
  bool any = false;
  for (const auto& rail : rails_) {
    if (rail->push->epoch == 0 && !rail->down) replace_sink(*rail);
    any |= rail->push->epoch > 0 && (rail->push->sink.is_open() || rail->push->was_open);
    if (!any) why_not = rail->last_error;
  }
  if (any) why_not.clear();
  return any;
}

// What has landed by then is counted; windows that were bound there are freed, and then it is
// destroyed, and only then gates are left.
void VerbsConnection::stop_sink(Rail& rail) {
  PushEnds& push = *rail.push;
  if (!push.sink.is_open()) return;
  push.sink.stop();
  drain(rail, {});
  windows_.free_all(rail);
  push.sink.close();
  push.sink_failed = false;
  windows_.settle();
}

void VerbsConnection::replace_sink(Rail& rail) {
  PushEnds& push = *rail.push;
  stop_sink(rail);
  if (is_dead()) return;
  if (push.epoch++ > 0) push.num_replaced.fetch_add(1, std::memory_order_relaxed);
  QpHead head{static_cast<uint32_t>(rail.number), push.epoch, 0, 0};
  if (!rail.down) {
    try {
      const QpEnd fresh = push.sink.open();
      head.number = fresh.number;
      head.psn = fresh.psn;
      push.was_open = true;
      push.sink_number.store(fresh.number, std::memory_order_relaxed);
    } catch (const Error& error) {
      rail.last_error = error.what();
    }
  }
  channel_.message(Type::kNewSink, {view_of(head)});
}

void VerbsConnection::tell_credit(Rail& rail, Type type, const std::vector<uint32_t>& held) {
  PushEnds& push = *rail.push;
  const SinkHead head{static_cast<uint32_t>(rail.number), push.epoch,
                      push.sink.is_connected() ? 1u : 0u, push.sink.posted()};
  push.sink.told();
  channel_.message(type, {view_of(head), view_of(std::span<const uint32_t>(held))});
}

bool VerbsConnection::on_new_pusher(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<QpHead>();
  std::vector<uint32_t> in_doubt;
  if (!reader.ok() || head.rail >= rails_.size() || !read_numbers(reader, kMaxInDoubt, in_doubt))
    return false;
  Rail& rail = rails_[head.rail];
  PushEnds& push = *rail.push;
  if (head.epoch != push.epoch || push.sink.is_connected()) return true;  // overtaken
  if (head.number != 0 && push.sink.is_open()) {
    try {
      push.sink.connect(rail.route, {head.number, head.psn});
    } catch (const Error& error) {
      rail.last_error = error.what();
      replace_sink(rail);  // which asks the same again
      return true;
    }
  }
  tell_credit(rail, Type::kSinkReady, incoming_.held(in_doubt));
  if (push.sink.is_connected()) windows_.bind_all(rail);
  return true;
}

void VerbsConnection::on_sink(Rail& rail, const ibv_wc& completion) {
  PushEnds& push = *rail.push;
  switch (work_of(completion.wr_id)) {
    case Work::kSinkMarker:
      return push.sink.on_marker(completion);
    case Work::kArrival:
      if (!push.sink.on_arrival(completion) || is_dead()) return;
      if (completion.status == IBV_WC_SUCCESS)
        incoming_.on_arrival(Immediate::unpack(ntohl(completion.imm_data)));
      else if (push.sink.is_running())
        push.sink_failed = true;  // the peer's NIC has met a key that is dead, or worse
      return;
    default:
      if (is_dead() || windows_.on_op(rail, completion)) return;
      if (push.sink.is_running()) push.sink_failed = true;
  }
}

void VerbsConnection::on_push_port(Rail& rail, bool up) {
  PushEnds& push = *rail.push;
  if (!up) stop_writer(rail);
  if (up) push.num_breaks = 0;
  if (push.peer_epoch > 0) ask_for_sink(rail);
  if (push.epoch > 0) replace_sink(rail);
}

// ---------------------------------------------------------------- leases that end

void VerbsConnection::lease_closed() noexcept {
  if (!why_no_push_.empty() || is_dead()) return;
  look_at_gates_.store(true, std::memory_order_relaxed);
  host_.reactor().attend(self());
}

void VerbsConnection::look_at_windows() {
  look_at_gates_.store(false, std::memory_order_relaxed);
  windows_.look_at_gates();
  if (std::exchange(windows_watched_, true)) return;
  windows_timer_ = host_.reactor().at(now_ns() + Windows::kPatienceNs, [weak = weak_from_this()] {
    auto self = std::static_pointer_cast<VerbsConnection>(weak.lock());
    if (!self || self->is_dead()) return;
    self->windows_watched_ = false;
    const int64_t next_ns =
        self->windows_.check(now_ns(), [&](Rail& rail) { self->replace_sink(rail); });
    self->host_.reactor().attend(self);
    if (next_ns != kNever && !self->is_dead()) self->look_at_windows();
  });
}

void VerbsConnection::stop_pushes() {
  for (const auto& rail : rails_) {
    if (!rail->push) continue;
    host_.reactor().cancel(rail->push->retry);
    windows_.free_all(*rail);
    rail->push->sink.close();
    (void)rail->push->writes.close();
    rail->push->flushed.clear();
    rail->push->in_doubt.clear();
    rail->push->in_use.store(false, std::memory_order_relaxed);
  }
  windows_.clear();
}

}  // namespace kvxfer::verbs
