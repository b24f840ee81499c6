// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Messages: cut into fragments of one receive buffer each, sent in order, never more than the peer
// has buffers for, over the control queue pair of one rail after the other.
//
// Every fragment has a number, and tells how many of the peer's its sender has taken, whose buffers
// are posted again. That is credit and acknowledgement in one: nobody has more than a window of
// fragments untaken at the peer, so its NIC never lacks a buffer (no RNR), and exactly those are
// kept to be sent again over another queue pair. One buffer is kept for kCredit, which is sent when
// half of the window was taken without being told.
//
// When messages move (control_pairs.cpp has the exchange), each side first ends its old queue pair,
// after which nothing comes over it, and then says how many fragments it has taken (kResume). The
// other goes on with the next one: none is lost, and none comes twice.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "transport/verbs/control_pair.hpp"
#include "transport/verbs/records.hpp"

namespace kvxfer::verbs {

enum class Sent : uint8_t { kSent, kNoRoom, kBroken };
enum class Heard : uint8_t { kNothing, kMessage, kMalformed };

// What a kResume said, and which rail it came by.
struct Resume {
  size_t rail = 0;
  uint32_t turn = 0;
  uint32_t received = 0;
};

class Channel {
 public:
  static constexpr uint32_t kFragmentBytes = 4096;  // with its head
  // With so many, the half of which a sender may not have been told leaves room for any message.
  // The most is a power of two, so that a fragment's place is its number modulo that, also when
  // numbers wrap.
  static constexpr uint32_t kMaxBuffers = 64, kMinBuffers = 52;
  // Of messages that wait for room. An honest peer leaves fewer untaken: some answers a request,
  // and for each of its leases what a window covers and has for keys.
  static constexpr size_t kMaxQueued = 64 * 1024, kMaxQueuedBytes = size_t{256} << 20;
  // What each direction of these devices gets; 0 when one cannot have enough.
  static uint32_t num_buffers(const Device& device) noexcept;
  static uint32_t num_buffers(const Devices& devices) noexcept;
  // Completion queue entries that this needs on each rail.
  static uint32_t num_entries(uint32_t num_buffers) noexcept {
    return 2 * num_buffers + ControlPair::kMoreSends + ControlPair::kResumes;
  }

  // By rail. Throws. No queue pair is there yet.
  Channel(const Devices& devices, std::span<ibv_cq* const> queues);
  uint32_t num_buffers() const noexcept { return num_buffers_; }

  // Any thread. try_message() does not go before what is queued; message() queues where there is
  // no room: answers, at most some a request, so that is bounded. While messages move they are
  // taken like before, as far as there is room.
  Sent try_message(Type type, std::initializer_list<ByteView> parts) noexcept;
  void message(Type type, std::initializer_list<ByteView> parts);
  bool flush() noexcept;  // of what is queued, and credits that are due; true when some went out
  // Room for bulk that must leave some for messages.
  bool is_wide() noexcept;
  // errno of a post that failed: messages must move, or the connection end. 0: none has.
  int error() const noexcept { return error_.load(std::memory_order_relaxed); }
  // More is queued than a peer that takes what it is told would leave: one was dropped.
  bool is_overrun() const noexcept { return overrun_.load(std::memory_order_relaxed); }
  // For reports: the rail that carries messages, and whether they wait for the peer to carry on.
  size_t rail() const noexcept { return rail_.load(std::memory_order_relaxed); }
  bool is_waiting() const noexcept { return !resumed_.load(std::memory_order_relaxed); }
  uint32_t num_moves() const noexcept { return num_moves_.load(std::memory_order_relaxed); }

  // The rest is the progress thread's, or before start().
  void begin(uint32_t peer_buffers);  // over the first rail; posts receives; throws

  // Queue pairs by rail (ControlPair). Of a fresh one receives are posted when open() returns.
  QpEnd open(size_t rail, uint32_t epoch);                             // throws
  void connect(size_t rail, const Route& route, const QpEnd& remote);  // throws
  bool is_open(size_t rail) const noexcept { return pairs_[rail].is_open(); }
  bool is_ready(size_t rail) const noexcept { return pairs_[rail].is_ready(); }
  uint32_t number(size_t rail) const noexcept { return pairs_[rail].number(); }
  bool is_mine(size_t rail, uint32_t number) const noexcept {
    return is_open(rail) && pairs_[rail].number() == number;
  }
  bool stop(size_t rail) noexcept;  // false: no marker will come
  uint64_t marker(size_t rail) const noexcept { return pairs_[rail].marker(); }
  bool is_stopping(size_t rail) const noexcept { return pairs_[rail].is_stopping(); }
  bool is_drained(size_t rail) const noexcept { return pairs_[rail].is_drained(); }
  void close(size_t rail) noexcept;
  void shut() noexcept;  // the connection ends: nothing is taken any more

  // False: the queue pair has failed, and is not one that we stopped.
  bool on_completion(size_t rail, const ibv_wc& completion) noexcept;
  Heard hear(Type& type, Bytes& body) noexcept;  // the next that has come
  std::optional<Resume> next_resume() noexcept;

  // Which move we are at: the higher turn wins, and the two sides never choose the same one.
  uint32_t turn() const noexcept { return turn_; }
  uint32_t next_turn(bool connecting) const noexcept;
  // A kResume has come that was not acted on: the peer has left the queue pair that we are at.
  bool is_behind() const noexcept { return seen_turn_ > turn_; }
  // Over this one, whose predecessor is closed, from now on: says so to the peer.
  void carry_on(size_t rail, uint32_t turn) noexcept;
  // The peer has said so too: what it has not taken is sent again. False: that makes no sense.
  bool resume(const Resume& peer) noexcept;

 private:
  struct Head {
    uint32_t type = 0;
    uint32_t nbytes = 0;    // of the whole message
    uint32_t received = 0;  // fragments that its sender has taken, ever
    uint32_t number = 0;    // of this fragment; of a kResume: the turn
  };
  static constexpr uint32_t kRoom = kFragmentBytes - sizeof(Head);
  static_assert(kMinBuffers / 2 + 1 > kMaxMessageBytes / kRoom + 1);
  static constexpr size_t kNoRail = ~size_t{0};
  struct Message {
    Type type;
    Bytes body;
  };
  // Buffers: those of receives, those of what is sent, then of each rail those of its kResume.
  std::byte* buffer(uint32_t number) noexcept {
    return memory_.data() + size_t{number} * kFragmentBytes;
  }
  uint32_t first_of(size_t rail) const noexcept {
    return num_buffers_ + kMaxBuffers + static_cast<uint32_t>(rail) * (ControlPair::kResumes + 1);
  }
  // Where a fragment is kept, counted from those of receives.
  static uint32_t place_of(uint32_t number) noexcept { return number % kMaxBuffers; }
  ibv_sge sge_of(const ControlPair& pair, uint32_t number, uint32_t nbytes) noexcept {
    return {reinterpret_cast<uint64_t>(buffer(number)), nbytes, pair.lkey(registration_.lkeys())};
  }
  // mutex_ held:
  bool fits(size_t nbytes, uint32_t reserve) const noexcept;
  void send(Type type, std::span<const ByteView> parts) noexcept;
  void post_from(uint32_t first) noexcept;  // all fragments from this one on
  void post_receive(ControlPair& pair, uint32_t number) noexcept;
  void on_received(size_t rail, uint32_t number, uint32_t nbytes) noexcept;
  bool on_fragment(const Head& head, ByteView rest) noexcept;

  const uint32_t num_buffers_;
  std::vector<std::byte> memory_;
  const Registration registration_;
  std::vector<ControlPair> pairs_;  // by rail; after the memory that they use

  // Over what is below and whatever is posted; held for copies of at most some 90 KiB and one post.
  std::mutex mutex_;
  std::deque<Message> queued_;
  size_t queued_nbytes_ = 0;
  bool dead_ = false;
  size_t current_ = kNoRail;
  uint32_t window_ = 0;  // fragments that the peer need not have taken
  // Counts of fragments, modulo 2^32.
  uint32_t sent_ = 0, acked_ = 0;  // acked: the peer has taken them
  uint32_t completed_ = 0;         // their work requests, as signalled ones tell
  uint32_t received_ = 0, told_ = 0;
  std::array<uint32_t, kMaxBuffers> lengths_{};  // of what is kept, by place
  std::vector<ibv_send_wr> chain_;
  std::vector<ibv_sge> sges_;
  // Whether there is something to flush, for a look without the lock. Relaxed: whoever stores it
  // is, or wakes, the progress thread.
  std::atomic<bool> any_queued_{false}, credit_due_{false}, overrun_{false};
  std::atomic<int> error_{0};
  // Relaxed: written under the mutex, read without it by reports alone.
  std::atomic<size_t> rail_{0};
  std::atomic<bool> resumed_{true};
  std::atomic<uint32_t> num_moves_{0};

  // Progress thread only.
  uint32_t turn_ = 0, seen_turn_ = 0;
  std::deque<Resume> resumes_;
  std::deque<Message> inbox_;
  bool malformed_ = false;
  Bytes coming_;  // the message that is coming
  uint32_t coming_type_ = 0, coming_nbytes_ = 0;
  bool is_coming_ = false;
};

}  // namespace kvxfer::verbs
