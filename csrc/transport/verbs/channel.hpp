// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Messages over the control queue pair: cut into fragments of one receive buffer each, sent in
// order, never more than the peer has buffers for.
//
// Every fragment tells how many receives its sender has posted since the beginning; who sends never
// has more than that outstanding, so the peer's NIC never lacks a buffer (no RNR). One buffer is
// kept for kCredit, which is sent when half of them were posted again without being told.
#pragma once

#include <atomic>
#include <deque>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/verbs/queue_pair.hpp"
#include "transport/verbs/records.hpp"

namespace kvxfer::verbs {

// What a completion belongs to: the kind in the upper byte of wr_id.
enum class Work : uint8_t {
  kSend = 1,
  kReceive = 2,
  kRead = 3,
  kSendMarker = 4,
  kReadMarker = 5,
  kWrite = 6,  // a chain of WRITEs
  kWriteMarker = 7,
  kWindow = 8,   // a bind, or an invalidation
  kArrival = 9,  // the receive of a chain's immediate
  kSinkMarker = 10,
};
constexpr uint64_t work_id(Work work, uint64_t number) {
  return uint64_t{static_cast<uint8_t>(work)} << 56 | (number & ((uint64_t{1} << 56) - 1));
}
constexpr Work work_of(uint64_t id) { return static_cast<Work>(id >> 56); }
constexpr uint64_t number_of(uint64_t id) { return id & ((uint64_t{1} << 56) - 1); }

enum class Sent : uint8_t { kSent, kNoRoom, kBroken };
enum class Heard : uint8_t { kFragment, kMessage, kMalformed };

class Channel {
 public:
  static constexpr uint32_t kFragmentBytes = 4096;  // with its head
  // With so many, the half of which a sender may not have been told leaves room for any message.
  static constexpr uint32_t kMaxBuffers = 64, kMinBuffers = 52;
  // What each direction of this device gets; 0 when it cannot have enough.
  static uint32_t num_buffers(const Device& device) noexcept;
  // Completion queue entries that this needs.
  static uint32_t num_entries(uint32_t num_buffers) noexcept { return 2 * num_buffers + 1; }

  // Throws. Receives are posted before it returns.
  Channel(std::shared_ptr<Device> device, ibv_cq* cq, uint32_t num_buffers);
  ~Channel();
  QpEnd end() const noexcept { return {qp_->qp_num, psn_}; }
  void connect(const Route& route, const QpEnd& remote, uint32_t peer_buffers);  // throws

  // Any thread. try_message() does not go before what is queued; message() queues where there is
  // no room: answers, at most some a request, so that is bounded.
  Sent try_message(Type type, std::initializer_list<ByteView> parts) noexcept;
  void message(Type type, std::initializer_list<ByteView> parts);
  bool flush() noexcept;  // of what is queued, and credits that are due; true when some went out
  // Room for bulk that must leave some for messages.
  bool is_wide() noexcept;
  // errno of a post that failed: the connection must end. 0: none has.
  int error() const noexcept { return error_.load(std::memory_order_relaxed); }

  // Progress thread.
  void on_sent(uint64_t number) noexcept;
  Heard on_received(const ibv_wc& completion, Type& type, Bytes& body);
  // To ERR, with a marker behind everything that was posted: Work::kSendMarker comes last.
  bool stop() noexcept;  // false: no marker will come
  void destroy() noexcept;

 private:
  struct Head {
    uint32_t type = 0;
    uint32_t nbytes = 0;  // of the whole message
    uint32_t posted = 0;  // receives of the sender, ever
    uint32_t reserved = 0;
  };
  static constexpr uint32_t kRoom = kFragmentBytes - sizeof(Head);
  static_assert(kMinBuffers / 2 + 1 > kMaxMessageBytes / kRoom + 1);
  struct Queued {
    Type type;
    Bytes body;
  };
  bool fits(size_t nbytes, uint32_t reserve) const noexcept;  // mutex_ held, like the next
  bool send(Type type, std::span<const ByteView> parts) noexcept;
  int post_receive(uint32_t buffer) noexcept;

  const std::shared_ptr<Device> device_;
  const uint32_t num_buffers_;
  const uint32_t psn_;
  QpShape shape_;
  std::vector<std::byte> memory_;  // receive buffers, then send buffers
  MrPtr mr_;
  QpPtr qp_;  // after the memory that it uses

  std::mutex mutex_;  // over all below; held for copies of at most some 90 KiB and one post
  std::deque<Queued> queued_;
  bool dead_ = false;
  // Counts of fragments, modulo 2^32.
  uint32_t sent_ = 0, completed_ = 0;  // completed: as signalled ones tell
  uint32_t peer_posted_ = 0, peer_buffers_ = 0;
  uint32_t posted_ = 0, told_ = 0;
  std::vector<ibv_send_wr> chain_;
  std::vector<ibv_sge> sges_;
  // Whether there is something to flush, for a look without the lock. Relaxed: whoever stores it
  // is, or wakes, the progress thread.
  std::atomic<bool> any_queued_{false}, credit_due_{false};
  std::atomic<int> error_{0};

  // Progress thread only: the message that is coming.
  Bytes coming_;
  uint32_t coming_type_ = 0, coming_nbytes_ = 0;
  bool is_coming_ = false;
};

}  // namespace kvxfer::verbs
