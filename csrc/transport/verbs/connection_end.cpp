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
  // A sink is through when every receive has come back as well, of which some have landed bytes.
  const auto sink_due = [&] { return rail.push && !rail.push->sink.is_running(); };
  const auto take = [&](const ibv_wc& each) {
    if (std::find(markers.begin(), markers.end(), each.wr_id) != markers.end())
      --missing;
    else if (work_of(each.wr_id) == Work::kRead)
      on_read(rail, each);
    else if (work_of(each.wr_id) == Work::kWrite)
      on_written(rail, each);
    else if (work_of(each.wr_id) >= Work::kWindow)
      on_sink(rail, each);
    else
      rail.held.push_back(each);
  };
  for (const ibv_wc& each : std::exchange(rail.held, {})) take(each);
  while ((missing > 0 || (sink_due() && !rail.push->sink.is_drained())) && now_ns() < until_ns) {
    ibv_wc completions[kMaxCompletions];
    const int n = rail.completions.poll(completions);
    if (n < 0) return;
    if (n == 0) std::this_thread::yield();
    for (int i = 0; i < n; ++i) take(completions[i]);
  }
}

void VerbsConnection::control_failed(const ibv_wc& completion) {
  const bool lost = completion.status == IBV_WC_RETRY_EXC_ERR;
  die({.code = lost ? Code::kPeerDisconnected : Code::kTransport,
       .text = cat("the control queue pair on ", rails_[0].device->name(), " failed: ",
                   api().wc_status_str(completion.status), " (vendor error ", completion.vendor_err,
                   ")", lost ? ": the peer's host or the network does not answer" : "")});
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
  const bool control_marked = channel_.stop();
  for (const auto& rail : rails_) {
    if (rail->token != 0) host_.reactor().remove(rail->token, rail->completions.fd());
    host_.reactor().cancel(rail->retry);
    if (rail->source) (void)stop_qp(rail->source.get());
    rail->stopping = true;
    if (rail->push) rail->push->sink.stop();
    const bool writes_marked = rail->push && rail->push->writes.stop();
    const bool marked = rail->pulls.stop();
    const uint64_t last_message = work_id(Work::kSendMarker, 0), last_read = rail->pulls.marker();
    if (rail->number == 0 && control_marked)
      marked ? drain(*rail, {last_message, last_read}) : drain(*rail, {last_message});
    else if (marked)
      drain(*rail, {last_read});
    if (rail->push) writes_marked ? drain(*rail, {rail->push->writes.marker()}) : drain(*rail, {});
  }
  channel_.destroy();
  stop_pushes();
  for (const auto& rail : rails_) {
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
