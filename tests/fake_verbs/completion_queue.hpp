// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Completion queues and the channels that tell of them.
#pragma once

#include <infiniband/verbs.h>

#include <atomic>
#include <cstdint>
#include <deque>

#include "events.hpp"

namespace fake_verbs {

struct Context;
struct QueuePair;
struct CompletionQueue;

struct CompEvent {
  CompletionQueue* cq = nullptr;
};

struct Channel : ibv_comp_channel {
  EventQueue<CompEvent> events;
};

struct Cqe {
  ibv_wc wc{};
  QueuePair* qp = nullptr;
  bool send = false;
  bool solicited = false;
  uint64_t retires = 0;    // polling it frees the send queue up to this request
  int64_t visible_ns = 0;  // before, the user sees neither it nor those behind it
};

struct CompletionQueue : ibv_cq {
  Channel* channel_of() const { return static_cast<Channel*>(channel); }

  std::deque<Cqe> entries;
  // Entries that poll may take: written under the NIC's lock, read by a poller without it, who only
  // learns that there is nothing to lock for.
  std::atomic<uint32_t> visible{0};
  enum class Armed : uint8_t { kNo, kSolicited, kNext } armed = Armed::kNo;
  bool overrun = false;
  std::atomic<bool> broken{false};  // overrun, or its device was removed; as `visible`
  int queue_pairs = 0;
  uint32_t comp_events_given = 0, async_events_given = 0;
};

}  // namespace fake_verbs
