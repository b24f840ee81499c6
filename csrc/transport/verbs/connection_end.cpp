// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How queue pairs are emptied, and how a connection ends.
#include <algorithm>
#include <thread>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {
// Takes a rail's completions until these have come; what is not of its READs is kept for later.
void VerbsConnection::drain(Rail& rail, std::initializer_list<uint64_t> markers) {
  size_t missing = markers.size();
  const int64_t until_ns = now_ns() + kFlushNs;
  // A sink is through when every receive has come back as well, of which some have landed bytes; so
  // is a control queue pair, of which some have brought messages.
  const auto sink_due = [&] { return rail.push && !rail.push->sink.is_running(); };
  const bool control_due = channel_.is_stopping(rail.number);
  const auto is_control = [](const ibv_wc& each) {
    return work_of(each.wr_id) == Work::kSend || work_of(each.wr_id) == Work::kReceive;
  };
  const auto is_through = [&] {
    return missing == 0 && (!sink_due() || rail.push->sink.is_drained()) &&
           (!control_due || channel_.is_drained(rail.number));
  };
  const auto take = [&](const ibv_wc& each) {
    if (std::find(markers.begin(), markers.end(), each.wr_id) != markers.end())
      --missing;
    else if (work_of(each.wr_id) == Work::kRead)
      on_read(rail, each);
    else if (work_of(each.wr_id) == Work::kWrite)
      on_written(rail, each);
    else if (work_of(each.wr_id) >= Work::kWindow)
      on_sink(rail, each);
    else if (control_due && is_control(each))
      on_control(rail, each);
    else
      rail.held.push_back(each);
  };
  for (const ibv_wc& each : std::exchange(rail.held, {})) take(each);
  while (!is_through() && now_ns() < until_ns) {
    ibv_wc completions[kMaxCompletions];
    const int n = rail.completions.poll(completions);
    if (n < 0) return;
    if (n == 0) std::this_thread::yield();
    for (int i = 0; i < n; ++i) take(completions[i]);
  }
}

void VerbsConnection::broken(const char* what) {
  die({.code = Code::kTransport, .text = cat("the peer broke the verbs protocol: ", what)});
}

// ERR first, so that everything posted comes back; then destroyed, after which neither NIC touches
// our memory; then the requests end.
void VerbsConnection::die(const Failure& cause) {
  {
    std::lock_guard lock(mutex_);
    if (dead_.exchange(true, std::memory_order_relaxed)) return;
  }
  host_.reactor().cancel(gates_timer_);
  host_.reactor().cancel(windows_timer_);
  channel_.shut();
  for (const auto& rail : rails_) {
    if (rail->token != 0) host_.reactor().remove(rail->token, rail->completions.fd());
    host_.reactor().cancel(rail->retry);
    if (rail->source) (void)stop_qp(rail->source.get());
    rail->stopping = true;
    if (rail->push) rail->push->sink.stop();
    const bool writes_marked = rail->push && rail->push->writes.stop();
    const bool pulls_marked = rail->pulls.stop();
    if (channel_.stop(rail->number)) drain(*rail, {channel_.marker(rail->number)});
    if (pulls_marked) drain(*rail, {rail->pulls.marker()});
    if (rail->push) writes_marked ? drain(*rail, {rail->push->writes.marker()}) : drain(*rail, {});
  }
  stop_pushes();
  for (const auto& rail : rails_) {
    channel_.close(rail->number);
    close_pulls(*rail);
    rail->drop_source();
    rail->held.clear();
    rail->in_use.store(false, std::memory_order_relaxed);
  }
  incoming_.clear();
  outgoing_.end_all(cause);
  host_.lost(*this, cause);
}

void VerbsConnection::close(const Failure& cause) noexcept {
  if (host_.reactor().on_thread()) return die(cause);
  host_.reactor().post([self = self(), cause] { self->die(cause); });
}

}  // namespace kvxfer::verbs
