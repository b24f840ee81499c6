// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own requests on a connection: a write says where its bytes are and waits for the owner's
// verdict, or is pushed through the window of its lease; a read is granted, pulled by our NIC, and
// judged by the owner's words.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/flights.hpp"
#include "transport/transport.hpp"
#include "transport/verbs/channel.hpp"
#include "transport/verbs/key_rows.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/push_window.hpp"
#include "transport/verbs/rail.hpp"
#include "transport/verbs/records.hpp"

namespace kvxfer::verbs {

class Outgoing {
 public:
  // `push`: windows are asked for.
  Outgoing(const Devices& devices, Channel& channel, Rails& rails, MemoryTable& memory,
           Connection& connection, Host& host, bool push);

  // Any thread.
  Status post(const RequestPtr& request, bool& needs_pump) noexcept;
  // `unanswered`: its source may be read until the owner answers, our NIC is through, or the queue
  // pair goes.
  Cancelled cancel(const RequestPtr& request, bool& unanswered) noexcept;
  bool room_wanted() noexcept;  // true once, when a post was turned away and there may be room now

  // Progress thread. False from on_…: the peer broke the protocol.
  bool on_outcome(ByteView body);
  bool on_more(ByteView body);
  bool on_use_messages(ByteView body);
  bool on_granted(ByteView body);
  bool on_read_data(ByteView body);
  bool pump();      // one message of a write that goes in messages
  bool pull_one();  // one chain of one read
  // One chain that waits to be posted again and that nobody wants any more, with or without a rail.
  bool drop_unwanted();
  void on_landed(ChunkPtr chunk, std::optional<Failure> failure);
  void on_flushed(ChunkPtr chunk);
  // When the first of the cancelled writes that are not quiet was cancelled, or kNever: of those
  // that the peer's NIC reads, or of those that ours pushes.
  int64_t unanswered_since(bool pushed) noexcept;
  // The peer's NIC reads nothing of ours until source_there(): what was cancelled is quiesced.
  void source_gone();
  void source_there() noexcept;
  // 16 registered bytes of each rail's own, for its probes.
  std::array<uint64_t, 2>& scratch(const Rail& rail) noexcept {
    return words_[kNumSlots + rail.number];
  }
  const Keys& scratch_lkeys() const noexcept { return words_registration_.lkeys(); }
  void end_all(const Failure& cause);  // when neither NIC touches our memory any more

  // Pushed writes (outgoing_push.cpp). Progress thread.
  bool on_window(ByteView body);
  bool on_window_key(ByteView body);
  bool on_no_window(ByteView body);
  bool on_revoke(ByteView body);
  bool push_one();                 // one chain of one write
  void on_pushed(ChunkPtr chunk);  // it is through, or nobody wants it any more
  // Its queue pair is gone, and whether it has landed is for the owner to say.
  void on_doubt(Rail& rail, ChunkPtr chunk, ibv_wc_status status);
  // The owner has the bytes of these (their immediates), and not of the others.
  void on_known(Rail& rail, const std::vector<uint32_t>& held);
  // What is in doubt of requests that are over: our memory is quiet, though nothing may begin yet.
  void bury(Rail& rail);
  bool is_dead_push(const Chunk& chunk) noexcept;
  void forget_keys(const Rail& rail);  // its sink is gone
  void give_up_pushing(const Failure& why);
  std::string push_text() const;  // any thread: whether writes are pushed, or why not

 private:
  struct Flight {
    RequestPtr request;  // null: the slot is free
    uint32_t generation = 0;
    RegionMemoryPtr memory;              // what the NICs may touch of it; may be null
    bool staged = false;                 // the bytes go in messages
    std::shared_ptr<PushWindow> window;  // through which they are pushed; null: they are not
    bool unsent = false;                 // waits for that window; the owner knows nothing of it
    bool accepted = false;               // a pushed one: the owner's word
    uint32_t num_chains = 0;             // of a pushed one, cut so far
    bool inside = false;     // the progress thread copies from or to its memory right now
    bool cancelled = false;  // the engine ended it; the slot waits for the owner's word
    bool unquiet = false;    // and Host::quiesced is due
    int64_t cancelled_ns = 0;
    uint32_t num_inside = 0;  // chunks that our NIC has, or that wait to be posted again
    // The next byte to announce (write) or to ask for (read): this span, at this offset.
    size_t span = 0;
    uint64_t offset = 0, announced = 0;
    // Progress thread only from here on: the next byte to send or to land, likewise.
    size_t next_span = 0;
    uint64_t next_offset = 0;
    uint64_t moved = 0;   // bytes sent, or for which a READ was posted
    uint64_t landed = 0;  // of a read
    bool queued = false;  // stands in pumping_ or pulling_
    struct Granted : Source {
      KeyRowsPtr rows;
    };
    std::deque<Granted> sources;  // not yet posted
    uint64_t source_offset = 0, granted = 0;
    WordSpot region, lease;
    Keys word_keys{};
    bool over = false;      // ends, with `failure` or well, when our NIC is through with it
    bool answered = false;  // the owner has said its last word
    std::optional<Failure> failure;
    // Nobody wants it any more, though chains of it may be under way.
    bool is_dead() const noexcept { return cancelled || failure; }
  };
  Sent send_request(Ticket ticket, const Request& request, Flight& flight, bool may_wait);
  void route(const Request& request, Flight& flight, std::shared_ptr<PushWindow> window);
  bool on_part(ByteView body, Ticket& ticket, Flight*& flight) noexcept;  // mutex_ held
  void next_segments(const Request& request, Flight& flight, std::vector<Segment>& out);
  void send_part(Ticket ticket, Flight& flight);
  uint64_t span_of(const Request& request, const RegionMemory* memory, uint64_t segment) const;
  RequestPtr enter(Ticket ticket) noexcept;
  void leave(Ticket ticket, Request& request) noexcept;
  void queue(std::deque<Ticket>& where, Ticket ticket, Flight& flight);
  void cut(const Request& request, Flight& flight, Chunk& chunk);
  bool look_at_words();
  bool pull_again();
  bool pull_next();
  bool pick(Ticket ticket, Rail*& rail) noexcept;  // mutex_ held
  Rail* rail_for_words(Ticket ticket, const Flight& flight) const noexcept;
  std::optional<Failure> judge(const Flight& flight, uint32_t slot) const;
  void end(Ticket ticket, Completion completion);
  bool is_wanted(const Chunk& chunk) noexcept;

  // Pushed writes; mutex_ held unless said.
  std::shared_ptr<PushWindow> window_of(const Request& request);
  bool fits(const Request& request, const RegionMemory& memory, const PushWindow& window) const;
  void open_if_ready(PushWindow& window);
  void release_waiting(PushWindow& window);
  void kill(Ticket ticket, Flight& flight, Failure failure);
  void chain_left(const Chunk& chunk);
  void cut_push(const Request& request, Flight& flight, Chunk& chunk);
  bool push_again();                // not held
  void settle_push(Ticket ticket);  // not held
  void chunk_left(Ticket ticket);
  void settle(Ticket ticket);

  Channel& channel_;
  Rails& rails_;
  MemoryTable& memory_;
  Connection& connection_;
  Host& host_;
  // Where our NICs store the words of each slot's read: the region's and the lease's. Then probes.
  std::vector<std::array<uint64_t, 2>> words_;
  const Registration words_registration_;

  mutable std::mutex mutex_;  // over all below, but for the progress thread's part of a Flight
  Flights<Flight> flights_;
  std::deque<Ticket> pumping_, pushing_;
  std::vector<Segment> segments_;  // scratch
  KeyRowsOut rows_;
  std::atomic<bool> any_pumping_{false}, any_pushing_{false}, room_wanted_{false};
  bool dead_ = false, source_gone_ = false;
  const bool push_;
  std::string no_push_;  // why no window is asked for any more; or empty
  std::string refusal_;  // why the owner gave no window for the last lease that it gave none for
  std::unordered_map<uint64_t, std::shared_ptr<PushWindow>> windows_;  // by lease
  // Chains of pushed requests that are over, posted or in doubt: nothing else may begin.
  uint32_t num_dead_inside_ = 0;

  // Progress thread only.
  std::deque<Ticket> pulling_;
  std::deque<ChunkPtr> again_;       // flushed, to be posted before anything else
  std::deque<Ticket> words_due_;     // reads of which every chain has been posted
  std::deque<ChunkPtr> push_again_;  // known not to have landed
  Bytes bytes_;
};

}  // namespace kvxfer::verbs
