// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's requests: judged, then copied by us, who own the memory; chunk by chunk, in turn.
//
// One thread copies, and looks at a request's slot word and gates before each chunk. So no copier
// is ever inside a cancelled request when a later one begins, and revoking waits for one chunk at
// most.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "transport/shm/channel.hpp"
#include "transport/shm/peer_memory.hpp"
#include "transport/transport.hpp"

namespace kvxfer::shm {

class Incoming {
 public:
  // `source` finds the peer's region, reading its announcement first if that is still under way.
  using Source = std::shared_ptr<PeerMemory> (*)(void* context, uint64_t region);
  // `show` lets the peer pull from a region of ours, and see the words that end this; false when
  // it cannot.
  using Show = bool (*)(void* context, const Region& region);
  Incoming(Channel& channel, Connection& connection, Host& host, Source source, Show show,
           void* context)
      : channel_(channel),
        connection_(connection),
        host_(host),
        source_(source),
        show_(show),
        context_(context) {}

  // False: the peer broke the protocol, and its connection must end.
  bool on_request(ByteView body);
  bool on_read_part(ByteView body);
  bool on_abort(ByteView body);
  bool on_read_done(ByteView body);
  // Records of the bulk ring. `finished` false: spans must wait until those before them are copied.
  bool on_spans(ByteView body, bool& finished);
  bool on_staged(ByteView body);
  bool copy_one();   // one chunk of one mapped write; true when it did something
  bool serve_one();  // one staging slot for one read
  void clear() { jobs_.clear(), copying_.clear(), serving_.clear(); }

 private:
  struct Job {
    Ticket ticket;
    Op op = Op::kWrite;
    Landing landing;
    Arrival arrival;
    std::shared_ptr<PeerMemory> source;
    bool granted = false;          // a read that the peer pulls by itself
    uint64_t num_spans = 0;        // seen so far
    std::deque<SpanRecord> spans;  // not yet copied or served; checked
    uint64_t offset = 0;           // within the first of them
    uint64_t nbytes = 0, done = 0;
    uint64_t announced = 0;  // bytes of all spans seen so far
  };
  using JobPtr = std::shared_ptr<Job>;

  JobPtr find(Ticket ticket) const;
  bool wanted(const JobPtr& job);  // still posted; a cancelled one is dropped
  bool check(Job& job, const std::vector<SpanRecord>& spans, bool& sane);
  bool copy_chunk(const JobPtr& job);
  bool can_grant(const Landing& landing);
  void grant(const Job& job);
  void finish(const JobPtr& job);
  void refuse(const JobPtr& job, Failure failure);
  void drop(const JobPtr& job);
  void tell(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure);

  Channel& channel_;
  Connection& connection_;
  Host& host_;
  Source source_;
  Show show_;
  void* context_;

  std::unordered_map<uint32_t, JobPtr> jobs_;  // by slot
  std::deque<JobPtr> copying_, serving_;
  std::vector<Pull> pulls_;  // of one chunk
};

}  // namespace kvxfer::shm
