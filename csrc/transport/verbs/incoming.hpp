// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's requests, judged and then carried out by us, who own the memory: a write is pulled
// out of the initiator's memory by RDMA READs, or comes through a window; a read is granted.
// Progress thread only.
//
// Gates are entered when a chain is posted and left at its completion, so revoking waits for our
// own NIC and nobody else; where it does not answer, Connection stops the queue pair.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "transport/transport.hpp"
#include "transport/verbs/channel.hpp"
#include "transport/verbs/key_rows.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/rail.hpp"
#include "transport/verbs/windows.hpp"

namespace kvxfer::verbs {

struct Job {
  Ticket ticket;
  Op op = Op::kWrite;
  Landing landing;
  Arrival arrival;
  RegionMemoryPtr memory;  // of landing.region; kept from leaving while the NIC may need it
  bool staged = false;     // its bytes come, or go, in messages
  bool granted = false;    // a read that the peer pulls
  bool pushed = false;     // a write whose bytes come through a window
  uint64_t nbytes = 0;
  uint64_t announced = 0;     // bytes of all segments that came
  uint64_t done = 0;          // bytes that landed, or were sent
  uint64_t num_segments = 0;  // that came
  struct Known : Segment {
    KeyRowsPtr rows;
  };
  std::deque<Known> window;  // those of them not yet cut, judged; a bounded number
  uint64_t offset = 0;       // in the first
  bool asked = false;        // for more segments
  bool begun = false;
  bool queued = false;      // stands in pulling_ or serving_
  uint32_t num_inside = 0;  // chunks that the NIC has, or that wait to be posted again
  bool stopping = false;    // ends, with `failure` or else as cancelled, when none is
  std::optional<Failure> failure;
};
using JobPtr = std::shared_ptr<Job>;

// Which chains of a pushed write have landed: a bitmap, so that one that is told twice counts once.
// One for each slot, since an immediate may overtake the request that it belongs to.
struct Arrived {
  uint32_t generation = 0;  // modulo Immediate::kGenerations
  std::vector<uint64_t> chains;
  uint32_t num = 0, total = 0;  // total: 0 as long as the last one has not come

  void begin(uint32_t of_generation) noexcept;
  void add(const Immediate& immediate);
  bool has(uint32_t chain) const noexcept {
    return chain / 64 < chains.size() && (chains[chain / 64] >> (chain % 64) & 1) != 0;
  }
  bool is_complete() const noexcept { return total > 0 && num == total; }
};

class Incoming {
 public:
  Incoming(Channel& channel, Rails& rails, MemoryTable& memory, const Windows& windows,
           Connection& connection, Host& host)
      : channel_(channel),
        rails_(rails),
        memory_(memory),
        windows_(windows),
        connection_(connection),
        host_(host),
        jobs_(kNumSlots),
        arrived_(kNumSlots),
        rows_(rails) {}

  // False: the peer broke the protocol, and its connection must end.
  bool on_request(ByteView body);
  bool on_part(ByteView body);
  bool on_write_data(ByteView body);
  bool on_read_done(ByteView body);
  bool on_abort(ByteView body);

  // One chain of one write. True when it did something.
  bool pull_one();
  bool serve_one();  // one message of a read that is sent
  // A chunk that is through. A failure is the request's; without one the bytes have landed.
  void on_landed(ChunkPtr chunk, std::optional<Failure> failure);
  // Its queue pair has gone before it was through: to be posted again on the next.
  void on_flushed(ChunkPtr chunk);
  // Whether a chunk in flight belongs to a request that was stopped.
  static bool is_dead(const Chunk& chunk) noexcept { return chunk.job && chunk.job->stopping; }
  // Whether a chunk in flight is inside gates that were closed meanwhile, since before `ns`.
  static bool waits_for_gate(const Chunk& chunk, int64_t ns) noexcept;
  // READs of requests that have been stopped may still store: nothing else may begin.
  bool held_back() const noexcept { return num_dead_inside_ > 0; }
  // Pushed writes: a chain has landed; which of these have; a lease's are over.
  void on_arrival(const Immediate& immediate);
  std::vector<uint32_t> held(const std::vector<uint32_t>& immediates) const;
  void stop_pushes(const Lease& lease, const Failure& failure);
  // Notifications that a caller has brought in who was lent the work: told when it comes back.
  void tell_late();
  void clear();  // when the NIC touches nothing any more

 private:
  JobPtr find(Ticket ticket) const;
  bool take(const JobPtr& job, const std::vector<Segment>& segments, const KeyRowsPtr& rows);
  void ask(Job& job);
  void cut(Job& job, Chunk& chunk);
  void start(ChunkPtr chunk, Rail& rail);
  bool pull_again();
  void stop(const JobPtr& job, std::optional<Failure> failure);
  void settle(const JobPtr& job);
  void left(const JobPtr& job);
  void finish(const JobPtr& job);
  void grant(Job& job, std::span<const Segment> segments);
  void tell(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure);
  void queue(const JobPtr& job);

  Channel& channel_;
  Rails& rails_;
  MemoryTable& memory_;
  const Windows& windows_;
  Connection& connection_;
  Host& host_;

  std::vector<JobPtr> jobs_;      // by slot; null: it is free
  std::vector<Arrived> arrived_;  // by slot
  std::deque<JobPtr> pulling_, serving_;
  std::deque<ChunkPtr> again_;    // flushed, to be posted before anything else
  uint32_t num_dead_inside_ = 0;  // chunks in flight of requests that have been stopped
  std::vector<Ticket> accepted_late_;
  std::vector<Target> targets_;  // scratch
  std::vector<Segment> segments_;
  std::vector<Source> sources_;
  KeyRowsOut rows_;
  Bytes bytes_;
};

}  // namespace kvxfer::verbs
