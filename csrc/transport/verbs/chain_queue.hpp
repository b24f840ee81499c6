// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Chains of work requests with one doorbell each: RDMA READs of the peer's memory into ours, or
// WRITEs of ours into a window of the peer's. Progress thread only.
//
// The last of a chain alone is signalled; a queue pair completes in order, so its completion is
// that of the chain. After an error every work request comes back, and the chain with the last.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "transport/verbs/queue_pair.hpp"
#include "transport/verbs/records.hpp"
#include "transport/verbs/work.hpp"

namespace kvxfer::verbs {

struct Job;
struct PushWindow;

// What one chain does; made by who needs the bytes, handed back when the NIC is through with it. It
// knows the keys of every rail, so any of them can carry it, and another one after a failure.
class Chunk {
 public:
  static constexpr uint32_t kMaxRequests = 64;
  static constexpr uint64_t kMaxBytes = uint64_t{1} << 20;  // gates are held for one at a time

  void clear() noexcept;
  // How much of `nbytes` was taken: less than all when the chain is full. `lkeys` outlives it.
  // `rkeys` are not looked at where there is a window.
  uint32_t add(uint64_t remote, const Keys& rkeys, std::byte* local, const Keys& lkeys,
               uint32_t nbytes, uint32_t max_sge);
  uint64_t nbytes() const noexcept { return nbytes_; }
  size_t num_requests() const noexcept { return ops_.size(); }

  // Whose it is: an incoming write, or (null) the read of ours that the ticket names.
  std::shared_ptr<Job> job;
  Ticket ticket;
  bool words = false;  // the look at the words behind a read
  bool probe = false;  // nobody's: whether the rail works at all
  // Of a write: what it goes through, and what its last request tells the owner.
  std::shared_ptr<PushWindow> window;
  uint32_t immediate = 0;
  bool on_gpu = false;  // what is written: no CPU may copy it into a work request
  int64_t posted_ns = 0;

 private:
  friend class ChainQueue;
  struct Op {
    uint64_t remote = 0;
    uint64_t nbytes = 0;
    Keys rkeys{};
    uint32_t first_sge = 0, num_sge = 0;
  };
  struct Piece {
    uint64_t address = 0;
    uint32_t nbytes = 0;
    const Keys* lkeys = nullptr;
  };
  std::vector<Op> ops_;
  std::vector<Piece> pieces_;
  uint64_t nbytes_ = 0;
};
using ChunkPtr = std::unique_ptr<Chunk>;

// Whether one request's addresses or keys have caused it; any other failure is the path's. A local
// QP operation error too: Soft-RoCE gives it where the interface is down, and what we post is well
// formed.
bool is_requests_own(ibv_wc_status status) noexcept;

class ChainQueue {
 public:
  static uint32_t depth(const Device& device) noexcept;
  static uint32_t num_entries(uint32_t depth) noexcept { return depth + 1; }

  // `rail`: which of the remote keys are its. `work`: kRead or kWrite.
  ChainQueue(std::shared_ptr<Device> device, ibv_cq* cq, size_t rail, Work work = Work::kRead);
  ~ChainQueue();

  // A fresh queue pair, not connected yet, after close(); throws.
  QpEnd open();
  void connect(const Route& route, const QpEnd& remote, uint8_t issued);  // throws
  // From here on chunks may be posted.
  void start() noexcept { ready_ = true; }
  bool is_ready() const noexcept { return ready_; }
  bool is_open() const noexcept { return qp_ != nullptr; }
  bool is_mine(uint32_t number) const noexcept { return qp_ && qp_->qp_num == number; }
  uint32_t max_sge() const noexcept { return shape_.max_send_sge; }

  // Whether a full chain has room, and bytes in flight are few enough.
  bool has_room() const noexcept;
  // `fence`: begins only when all reads before it have come. When it fails, post_error() says why;
  // the queue pair is of no use any more and the chunk stays until it is stopped.
  void post(ChunkPtr chunk, bool fence) noexcept;
  int post_error() const noexcept { return post_error_; }  // since open(); 0: none
  uint64_t nbytes_in_flight() const noexcept { return nbytes_; }

  // A completion of ours. `done`: a chunk that is through, whole or not.
  struct Outcome {
    bool is_mine = false;  // false: of a queue pair that is gone
    ChunkPtr done{};
    ibv_wc_status status = IBV_WC_SUCCESS;  // of its first work request that failed
  };
  Outcome on_completion(const ibv_wc& completion) noexcept;
  // What the first failure was since open(); IBV_WC_SUCCESS: none.
  ibv_wc_status first_error() const noexcept { return first_error_; }
  uint32_t vendor_error() const noexcept { return vendor_error_; }

  // To ERR with a marker behind, which comes last. False: none will come.
  bool stop() noexcept;
  uint64_t marker() const noexcept {
    return work_id(work_ == Work::kRead ? Work::kReadMarker : Work::kWriteMarker, epoch_);
  }
  // Destroys the queue pair, after which the NIC touches nothing: what was in flight, in order.
  std::deque<ChunkPtr> close() noexcept;

  bool is_empty() const noexcept { return in_flight_.empty(); }
  const std::deque<ChunkPtr>& in_flight() const noexcept { return in_flight_; }

 private:
  // A quarter of a second of a slow link and far more than any fast one needs.
  static constexpr uint64_t kMaxBytesInFlight = uint64_t{8} << 20;
  uint64_t id(uint64_t sequence, bool last) const noexcept {
    return work_id(work_, uint64_t{epoch_ & 0xff} << 48 |
                              (sequence & ((uint64_t{1} << 47) - 1)) << 1 | (last ? 1 : 0));
  }

  const std::shared_ptr<Device> device_;
  ibv_cq* const cq_;
  const size_t rail_;
  const Work work_;
  const uint32_t depth_;
  QpShape shape_;
  QpPtr qp_;
  uint32_t psn_ = 0;
  uint32_t epoch_ = 0;  // of queue pairs: completions of an earlier one are not ours
  bool ready_ = false;
  std::deque<ChunkPtr> in_flight_;
  uint64_t next_ = 0;  // sequence number of the next chunk
  size_t num_requests_ = 0;
  uint64_t nbytes_ = 0;
  ibv_wc_status chain_status_ = IBV_WC_SUCCESS;  // of in_flight_.front() so far
  ibv_wc_status first_error_ = IBV_WC_SUCCESS;
  uint32_t vendor_error_ = 0;
  int post_error_ = 0;
  std::vector<ibv_send_wr> chain_;  // scratch
  std::vector<ibv_sge> sges_;
};

}  // namespace kvxfer::verbs
