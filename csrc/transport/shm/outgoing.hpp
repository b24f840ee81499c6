// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own requests on a connection: posting, feeding staged bytes, landing what was read, how each
// ends.
#pragma once

#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "transport/flights.hpp"
#include "transport/shm/channel.hpp"
#include "transport/shm/peer_memory.hpp"
#include "transport/transport.hpp"

namespace kvxfer::shm {

class Outgoing {
 public:
  // `show` lets the peer pull from a region of ours; false when it cannot.
  using Show = bool (*)(void* context, const Region& region);
  Outgoing(Channel& channel, Connection& connection, Host& host, Show show, void* context);

  // Any thread.
  Status post(const RequestPtr& request, bool& needs_pump) noexcept;
  Cancelled cancel(const RequestPtr& request) noexcept;
  bool room_wanted() noexcept;  // true once, when a post was turned away and there may be room now

  // Progress thread. False from the two on_… means that the peer broke the protocol.
  bool on_outcome(const OutcomeHead& outcome, std::string_view text);
  bool on_read_data(const StageHead& head, const std::byte* bytes);
  // `memory`: the region that the grant names, or null when the peer has not shown it.
  bool on_granted(const GrantHead& head, std::shared_ptr<PeerMemory> memory);
  bool pump();      // one chunk of a write; true when it did something
  bool pull_one();  // one chunk of a read that was granted
  void end_all(const Failure& cause);

 private:
  struct Flight {
    RequestPtr request;  // null: the slot is free
    uint32_t generation = 0;
    bool mapped = false;
    bool inside = false;     // the progress thread copies from or to its memory right now
    bool cancelled = false;  // the engine ended it; the slot waits for the owner's word
    // Progress thread only from here on.
    size_t judged = 0;      // spans sent to be judged; of a write
    size_t window_end = 0;  // spans sent to be copied; of a write
    size_t span = 0;        // next byte to stage, or to store: this span,
    uint64_t offset = 0;    // at this offset
    size_t asked_spans = 0;
    uint64_t asked = 0, landed = 0;  // bytes of a read
    bool accepted = false;
    std::shared_ptr<PeerMemory> memory;  // of a granted read
    Watch watch;
    size_t granted = 0;    // spans that may be pulled
    bool pulling = false;  // stands in pulling_
  };
  // The owner cannot accept what this slot posted any more; false: it has. mutex_ held.
  bool take_back(uint32_t slot) noexcept;
  RequestPtr enter(Ticket ticket) noexcept;
  void leave(Ticket ticket, Request& request) noexcept;
  static std::span<const Span> spans_from(const Request& request, size_t first);  // of one record
  bool pump_one(Ticket ticket, const Request& request, Flight& flight, bool& finished);
  bool pump_spans(Type type, Ticket ticket, const Request& request, size_t& sent);
  bool pump_staged(Ticket ticket, const Request& request, Flight& flight);
  void ask(Ticket ticket, const Request& request, Flight& flight);
  // The slot is free again; null: the engine has ended the request already. mutex_ held.
  RequestPtr give_up(Ticket ticket, const Flight& flight) noexcept;
  void tell(const RequestPtr& request, Completion completion);
  void end(Ticket ticket, Completion completion);
  void end_pulled(Ticket ticket, std::optional<Failure> failure);

  Channel& channel_;
  Connection& connection_;
  Host& host_;
  Show show_;
  void* context_;

  std::mutex mutex_;  // over all below, but for the progress thread's part of a Flight
  Flights<Flight> flights_;
  std::deque<Ticket> pumping_;
  std::deque<Ticket> pulling_;  // progress thread only, like the next
  std::vector<Pull> pulls_;
  struct Piece {
    std::byte* to;
    const std::byte* from;
    size_t nbytes;
  };
  std::vector<Piece> pieces_;  // of one staging slot
  // The two that every poll looks at without the lock, for which a stale answer does no harm: what
  // is stored before the lock is released is seen by whoever is woken because of it.
  std::atomic<bool> any_pumping_{false}, room_wanted_{false};
  bool dead_ = false;
};

}  // namespace kvxfer::shm
