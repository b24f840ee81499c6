// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A rail of a connection: one port of ours joined to one of the peer's. It has two queue pairs over
// a completion queue of its own:
//
//   pull     our RDMA READs of the peer's memory (ChainQueue)
//   source   answers the peer's READs of ours: no work of ours is ever posted on it
//
// Where writes are pushed it has two more (push_ends.hpp), and one more is the Channel's, which
// carries messages or stands by for them.
// Which rail takes a chain is decided when the chain is posted (Rails::pick). replace.cpp has what
// is done when one fails. Progress thread only, but for what is said to be for reports.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "transport/reactor.hpp"
#include "transport/verbs/chain_queue.hpp"
#include "transport/verbs/completion_queue.hpp"
#include "transport/verbs/preference.hpp"
#include "transport/verbs/push_ends.hpp"

namespace kvxfer::verbs {

// What a side must know of the other's end of a rail; travels in the join.
struct RailEnd {
  QpEnd pull, source, control;
  uint32_t word_rkey = 0;          // of the sender's identity
  uint8_t served = 0, issued = 0;  // RDMA READs in flight: as their responder, as their requester
  uint16_t reserved = 0;
};

struct Rail {
  // `more_entries` of the completion queue, beside those for READs and pushes: for messages.
  // Throws.
  Rail(const std::shared_ptr<Device>& device, size_t number, uint32_t more_entries, bool push);
  ~Rail();
  void connect(const Route& route, const RailEnd& remote);  // throws
  // Nothing is read from it any more.
  void drop_source() noexcept;
  void make_source();  // a fresh one, not connected yet; throws
  // Whether it carries chains, or may do so again before anything else happens.
  bool is_left() const noexcept;
  // How long it is left alone after its last failure; 0: not at all.
  int64_t pause_ns() const noexcept;

  const size_t number;  // the same on both sides
  const std::shared_ptr<Device> device;
  CompletionQueue completions;
  ChainQueue pulls;
  QpPtr source;
  std::unique_ptr<PushEnds> push;  // null: this connection pushes nothing
  Route route;
  RailEnd end;     // ours, as it was in the beginning
  RailEnd remote;  // likewise
  uint32_t source_psn = 0;
  uint8_t served, issued;

  uint32_t source_epoch = 0;  // of ours
  uint32_t peer_epoch = 0;    // of the peer's source
  bool serving = true;        // our source is connected
  bool absent = false;        // the peer says that it has none for now
  bool down = false;          // our port, or the whole device
  uint32_t num_breaks = 0;    // since a chain last came through
  bool failed = false;        // a READ came back with an error: to be seen to
  bool stopping = false;      // chains that are flushed wait in `parked`
  std::deque<std::pair<ChunkPtr, ibv_wc_status>> parked;
  std::deque<ibv_wc> held;  // completions taken while something else was waited for
  std::string last_error;   // in words
  Reactor::TimerId retry = Reactor::kNoTimer;
  Reactor::Token token = 0;

  uint32_t control_epoch = 0;             // of its queue pair for messages
  std::optional<Failure> control_failed;  // that one has: to be seen to

  // For reports; relaxed.
  std::atomic<bool> in_use{false}, source_gone{false};
  std::atomic<uint32_t> puller{0};                    // number of the queue pair that reads now
  std::atomic<uint32_t> control{0};                   // and of the one for messages
  std::atomic<uint32_t> num_replaced{0};              // sources
  std::atomic<uint64_t> num_chains{0}, num_bytes{0};  // that came through
};

class Rails {
 public:
  // Of which kMaxBreaks may fail in a row, with nothing that came through in between.
  static constexpr uint32_t kMaxBreaks = 4;
  // The first pause of a rail that goes on failing; each is twice as long as the one before.
  static constexpr int64_t kFirstPauseNs = 100'000'000;

  // `by_nearness`: chains go to the NICs that their memory prefers; else all are alike. Throws.
  Rails(const Devices& devices, bool by_nearness, uint32_t more_entries, bool push);
  // What the completion queue of such a rail has.
  static uint32_t num_entries(const Device& device, uint32_t more_entries, bool push) noexcept;
  size_t size() const noexcept { return rails_.size(); }
  Rail& operator[](size_t number) const noexcept { return *rails_[number]; }
  auto begin() const noexcept { return rails_.begin(); }
  auto end() const noexcept { return rails_.end(); }
  std::vector<ibv_cq*> queues() const;  // of completions

  // The one with room that has the least to do, of the nearest ones that are in use at all. Null:
  // none of those has room.
  Rail* pick(const Preference& nearest) const noexcept;
  bool any_room() const noexcept;
  // The same for chains of a write through this window: of the rails on which it has a key.
  Rail* pick_push(const Preference& nearest, const PushWindow& window) const noexcept;
  bool any_left() const noexcept;
  uint32_t max_sge() const noexcept { return max_sge_; }  // of a READ on any of them
  // The keys of this memory on each rail, as the peer gets to know them.
  Keys row_of(const Registration& registration) const noexcept;

  ChunkPtr new_chunk();
  void recycle(ChunkPtr chunk);

 private:
  template <typename Usable, typename HasRoom, typename Chains>
  Rail* least_busy(const Preference& nearest, Usable usable, HasRoom has_room,
                   Chains chains) const noexcept;

  std::vector<std::unique_ptr<Rail>> rails_;
  const bool by_nearness_;
  uint32_t max_sge_ = 0;
  std::vector<ChunkPtr> idle_;
};

}  // namespace kvxfer::verbs
