// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own requests on a connection: a write says where its bytes are and waits for the owner's
// verdict; a read is granted, pulled by our NIC, and judged by the owner's words.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transport/flights.hpp"
#include "transport/transport.hpp"
#include "transport/verbs/channel.hpp"
#include "transport/verbs/key_rows.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/rail.hpp"
#include "transport/verbs/records.hpp"

namespace kvxfer::verbs {

class Outgoing {
 public:
  Outgoing(const Devices& devices, Channel& channel, Rails& rails, MemoryTable& memory,
           Connection& connection, Host& host);

  // Any thread.
  Status post(const RequestPtr& request, bool& needs_pump) noexcept;
  // `unanswered`: its source may be read until the owner answers, or the source goes.
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
  void on_landed(ChunkPtr chunk, std::optional<Failure> failure);
  void on_flushed(ChunkPtr chunk);
  // Whether a cancelled write has waited for the owner's answer since before `ns`; when the first
  // of those that wait was cancelled, or kNever.
  int64_t unanswered_since() noexcept;
  // The peer's NIC reads nothing of ours until source_there(): what was cancelled is quiesced.
  void source_gone();
  void source_there() noexcept;
  // 16 registered bytes of each rail's own, for its probes.
  std::array<uint64_t, 2>& scratch(const Rail& rail) noexcept {
    return words_[kNumSlots + rail.number];
  }
  const Keys& scratch_lkeys() const noexcept { return words_registration_.lkeys(); }
  void end_all(const Failure& cause);  // when neither NIC touches our memory any more

 private:
  struct Flight {
    RequestPtr request;  // null: the slot is free
    uint32_t generation = 0;
    RegionMemoryPtr memory;  // what the NICs may touch of it; may be null
    bool staged = false;     // the bytes go in messages
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
  };
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

  std::mutex mutex_;  // over all below, but for the progress thread's part of a Flight
  Flights<Flight> flights_;
  std::deque<Ticket> pumping_;
  std::vector<Segment> segments_;  // scratch
  KeyRowsOut rows_;
  std::atomic<bool> any_pumping_{false}, room_wanted_{false};
  bool dead_ = false, source_gone_ = false;

  // Progress thread only.
  std::deque<Ticket> pulling_;
  std::deque<ChunkPtr> again_;    // flushed, to be posted before anything else
  std::deque<Ticket> words_due_;  // reads of which every chain has been posted
  Bytes bytes_;
};

}  // namespace kvxfer::verbs
