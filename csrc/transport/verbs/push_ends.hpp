// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A rail's part in pushed writes: the queue pair that carries ours, and the one that takes the
// peer's. Both are made when the first window is asked for (push_pairs.cpp). Progress thread only,
// but for what is for reports.
#pragma once

#include <atomic>
#include <deque>
#include <utility>

#include "transport/reactor.hpp"
#include "transport/verbs/chain_queue.hpp"
#include "transport/verbs/sink.hpp"

namespace kvxfer::verbs {

struct PushEnds {
  static uint32_t num_entries(const Device& device) noexcept {
    return ChainQueue::num_entries(ChainQueue::depth(device)) + Sink::num_entries(device);
  }
  PushEnds(const std::shared_ptr<Device>& device, ibv_cq* cq, size_t rail)
      : writes(device, cq, rail, Work::kWrite), sink(device, cq, rail) {}

  // Whether a chain may go: has_room(), and a receive of the peer's for its immediate.
  bool has_room() const noexcept {
    return writes.has_room() && static_cast<int32_t>(credit - num_posted) > 0;
  }
  bool is_given_up() const noexcept { return num_breaks > kMaxBreaks; }

  // Chains that can be in doubt on one rail: at most as many as its send queue holds.
  static constexpr size_t kMaxInDoubt = 4096;
  static constexpr uint32_t kMaxBreaks = 4;  // in a row, with no chain that came through in between

  // Ours, as the writer.
  ChainQueue writes;
  uint32_t peer_epoch = 0;              // of the peer's sink; 0: it has made none yet
  uint32_t credit = 0, num_posted = 0;  // receives of that sink, chains through it; modulo 2^32
  uint32_t num_breaks = 0;              // since a chain last came through
  bool absent = false;                  // the peer has said that it has no sink for now
  bool rested = false;                  // the pause after the last failure is over
  bool failed = false;                  // a chain came back with an error: to be seen to
  // Chains that did not come through: of a queue pair that is still there; of one that is gone, and
  // nobody here knows whether they have landed.
  std::deque<std::pair<ChunkPtr, ibv_wc_status>> flushed, in_doubt;
  uint32_t num_dead_in_doubt = 0;  // likewise, of requests that are over
  Reactor::TimerId retry = Reactor::kNoTimer;

  // Ours, as the owner.
  Sink sink;
  uint32_t epoch = 0;  // of it; 0: none was made yet
  bool sink_failed = false;
  bool was_open = false;  // one could be made here at least

  // For reports; relaxed.
  std::atomic<bool> in_use{false};
  std::atomic<uint32_t> num_replaced{0};              // sinks, and writers that failed
  std::atomic<uint64_t> num_chains{0}, num_bytes{0};  // that came through
  std::atomic<uint32_t> writer{0}, sink_number{0};    // numbers of the queue pairs in use
};

}  // namespace kvxfer::verbs
