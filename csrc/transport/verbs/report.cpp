// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What a connection tells about itself; any thread, so by what rails have for reports.
#include <algorithm>

#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {

std::vector<VerbsConnection::Carried> VerbsConnection::carried() const {
  std::vector<Carried> out;
  for (const auto& rail : rails_)
    out.push_back({rail->num_chains.load(std::memory_order_relaxed),
                   rail->num_bytes.load(std::memory_order_relaxed),
                   rail->puller.load(std::memory_order_relaxed),
                   rail->in_use.load(std::memory_order_relaxed)});
  for (size_t i = 0; i < out.size(); ++i) {
    out[i].control = rails_[i].control.load(std::memory_order_relaxed);
    out[i].carries_messages = channel_.rail() == i;
  }
  for (size_t i = 0; i < out.size() && why_no_push_.empty(); ++i) {
    const PushEnds& push = *rails_[i].push;
    out[i].chains_pushed = push.num_chains.load(std::memory_order_relaxed);
    out[i].nbytes_pushed = push.num_bytes.load(std::memory_order_relaxed);
    out[i].pusher = push.writer.load(std::memory_order_relaxed);
    out[i].sink = push.sink_number.load(std::memory_order_relaxed);
    out[i].pushing = push.in_use.load(std::memory_order_relaxed);
  }
  return out;
}

std::string VerbsConnection::describe() const {
  std::string out = cat("verbs: ", rails_.size(), " rail(s), messages over rail ", channel_.rail(),
                        ", moved ", channel_.num_moves(), " time(s); ");
  const bool any_windows =
      std::ranges::any_of(rails_, [](const auto& rail) { return rail->device->has_windows(); });
  if (why_no_push_.empty())
    out += cat("our writes are ", outgoing_.push_text(), "; ",
               any_windows
                   ? cat("for the peer's, ", windows_.num(), " lease(s) of ours have a window now")
                   : std::string("the peer's are pulled: no device of ours has memory "
                                 "windows of type 2B"));
  else
    out +=
        cat("the owner pulls: no region is remotely writable; nothing is pushed: ", why_no_push_);
  for (const auto& rail : rails_) {
    const Route& route = rail->route;
    out += cat("\n    rail ", rail->number, ": ", rail->device->name(), ", ",
               rail->device->place().text(), ", ", route.path.reason, ", MTU ", 128 << route.mtu,
               ", ", int{rail->issued}, " READs in flight, gives up after ", int{route.retry_count},
               " retries of ", (int64_t{4096} << route.timeout) / 1'000'000, " ms; ",
               rail->in_use.load(std::memory_order_relaxed) ? "in use" : "not in use", ", ",
               rail->num_bytes.load(std::memory_order_relaxed), " bytes pulled, ",
               rail->num_replaced.load(std::memory_order_relaxed), " queue pair(s) replaced");
    if (rail->control.load(std::memory_order_relaxed) == 0)
      out += "; it could not carry messages now";
    if (!rail->push) continue;
    out += cat("; ", rail->push->num_bytes.load(std::memory_order_relaxed), " bytes pushed, ",
               rail->push->num_replaced.load(std::memory_order_relaxed),
               " queue pair(s) of pushes replaced");
  }
  return out + unpaired_;
}

std::string VerbsConnection::condition() const {
  std::string out;
  const auto say = [&](const Rail& rail, const char* what) {
    out +=
        cat(out.empty() ? "" : "; ", "rail ", rail.number, " (", rail.device->name(), "): ", what);
  };
  if (channel_.is_waiting())
    say(rails_[channel_.rail()], "messages wait for the peer to carry on over it");
  for (const auto& rail : rails_) {
    if (!rail->in_use.load(std::memory_order_relaxed))
      say(*rail, "our RDMA READs wait for the peer to connect a fresh queue pair");
    if (rail->source_gone.load(std::memory_order_relaxed))
      say(*rail, "the peer's RDMA READs wait until it has answered about a fresh queue pair");
  }
  return out;
}

}  // namespace kvxfer::verbs
