// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's requests: judged, then copied by us, who own the memory; chunk by chunk, in turn.
//
// The progress thread cuts chunks and takes them back; a copier (itself, or a thread of the copy
// pool) looks at the request's slot word and gates before each. So revoking waits for one chunk a
// copier at most. No request begins while a copier is inside a cancelled one of this connection.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "transport/copy_pool.hpp"
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
  // `copiers` empty: the progress thread copies.
  Incoming(Channel& channel, Connection& connection, Host& host,
           std::shared_ptr<CopyClient> copiers, Source source, Show show, void* context)
      : channel_(channel),
        connection_(connection),
        host_(host),
        copiers_(std::move(copiers)),
        source_(source),
        show_(show),
        context_(context),
        jobs_(kNumSlots) {}

  // False: the peer broke the protocol, and its connection must end.
  bool on_request(ByteView body);
  bool on_read_part(ByteView body);
  bool on_abort(ByteView body);
  bool on_read_done(ByteView body);
  // Records of the bulk ring. `finished` false: not now, it waits for those before it.
  bool on_check(ByteView body);
  bool on_spans(ByteView body, bool& finished);
  bool on_staged(ByteView body, bool& finished);
  bool copy_one();   // one chunk of one mapped write; true when it did something
  bool serve_one();  // one staging slot for one read
  bool collect();    // what the pool has copied
  // Notifications that a caller has brought in who was lent the work: their outcome is told when it
  // comes back, after the answer that it may give at once.
  void tell_late();
  void clear();  // returns when no copier is inside

 private:
  struct Job {
    Ticket ticket;
    Op op = Op::kWrite;
    Landing landing;
    Arrival arrival;
    std::shared_ptr<PeerMemory> source;  // of a mapped write
    bool granted = false;                // a read that the peer pulls by itself
    uint64_t num_spans = 0;              // of a read, seen so far
    uint64_t nbytes = 0;
    uint64_t checked = 0;    // bytes of all spans judged before the first is copied
    uint64_t announced = 0;  // bytes of all spans that came to be copied or served
    uint64_t done = 0;       // bytes copied or served
    // A write: those that came last, and the first byte that no copier has got yet.
    std::vector<SpanRecord> window;
    size_t next = 0;
    uint64_t next_offset = 0;
    bool begun = false;
    uint32_t num_inside = 0;  // chunks that copiers have
    bool stopping = false;    // ends, with `failure` or else as cancelled, when the last is back
    std::optional<Failure> failure;
    std::optional<std::deque<SpanRecord>> spans;  // of a read: not yet served; checked
    uint64_t offset = 0;                          // within the first of them
  };
  using JobPtr = std::shared_ptr<Job>;
  // What a copier does at a time; the progress thread writes it before, and reads it after.
  struct Chunk final : CopyTask {
    enum class Result : uint8_t { kCopied, kFailed, kCancelled };
    void run() noexcept override;
    JobPtr job;
    const std::atomic<uint64_t>* slot = nullptr;
    std::vector<Pull> pulls;
    const std::byte* staged = nullptr;  // where they count from; null: they are of job->source
    std::optional<uint64_t> stage;      // to be returned
    Result result = Result::kCopied;
    std::optional<Failure> failure;
  };
  using ChunkPtr = std::unique_ptr<Chunk>;

  JobPtr find(Ticket ticket) const;  // not when it is stopping
  bool full() const noexcept { return copiers_ && copiers_->full(); }
  bool posted(const Job& job) noexcept;
  bool wanted(const JobPtr& job);  // still posted; a cancelled one is stopped
  bool held_back() noexcept;
  std::optional<Failure> judge(const Job& job, std::span<const SpanRecord> spans);
  ChunkPtr new_chunk(const JobPtr& job);
  void cut(Job& job, Chunk& chunk, ChunkLimit limit);
  void start(ChunkPtr chunk);
  void land(ChunkPtr chunk);
  void stop(const JobPtr& job, std::optional<Failure> failure);
  void settle(const JobPtr& job);
  bool can_grant(const Landing& landing);
  void grant(const Job& job);
  void finish(const JobPtr& job);
  void refuse(const JobPtr& job, Failure failure);
  void drop(const JobPtr& job);
  void tell(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure);

  Channel& channel_;
  Connection& connection_;
  Host& host_;
  std::shared_ptr<CopyClient> copiers_;
  Source source_;
  Show show_;
  void* context_;

  std::vector<JobPtr> jobs_;  // by slot; null: it is free
  std::vector<Ticket> accepted_late_;
  std::deque<JobPtr> copying_, serving_;
  std::vector<const Chunk*> inside_;  // given to the pool and not collected
  std::vector<ChunkPtr> idle_;        // to be used again
  std::vector<Target> targets_;       // scratch of judge()
};

}  // namespace kvxfer::shm
