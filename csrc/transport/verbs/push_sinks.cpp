// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's side of pushed writes on a connection: sinks that come and go (push_pairs.cpp has the
// whole exchange), and leases that end.
#include <arpa/inet.h>

#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {

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
  if (!reader.ok() || head.rail >= rails_.size() ||
      !read_numbers(reader, PushEnds::kMaxInDoubt, in_doubt))
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
