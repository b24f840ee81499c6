// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One side's view of a connection's shared memory: rings, staging slots and the bells that wake the
// peer.
#pragma once

#include <deque>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>

#include "common/fd.hpp"
#include "transport/shm/control.hpp"
#include "transport/shm/records.hpp"
#include "transport/shm/segment.hpp"

namespace kvxfer::shm {

class Channel {
 public:
  // `me`: 0 for the side that connected. Bells are non-blocking eventfds, each woken by the other
  // side.
  Channel(std::shared_ptr<Mapping> control, int me, Segment staging,
          std::shared_ptr<Mapping> peer_staging, Fd my_bell, Fd peer_bell);

  int bell() const noexcept { return my_bell_.get(); }
  void hear_bell() noexcept;
  std::atomic<uint64_t>& my_slot(uint32_t i) noexcept { return mine().slots[i]; }
  std::atomic<uint64_t>& peer_slot(uint32_t i) noexcept { return theirs().slots[i]; }

  // Messages out; any thread. try_message fails when there is no room (or others wait for it), and
  // leaves the bell to a caller that may have a lock to let go first; message() queues instead:
  // outcomes and aborts, at most one a slot, so the queue is bounded.
  enum class Sent : uint8_t { kNoRoom, kHeard, kMustRing };
  Sent try_message(Type type, std::initializer_list<ByteView> parts) noexcept;
  void ring() noexcept;  // a system call that may cost microseconds, and wakes a thread
  void message(Type type, std::initializer_list<ByteView> parts);
  bool flush();  // queued ones; true when some went out
  // A message is about to come: a peer that sleeps wakes up meanwhile, and spins until it is there.
  void ring_early() noexcept;

  // Everything below: progress thread only.
  bool bulk(Type type, std::initializer_list<ByteView> parts) noexcept;
  // The next staging slot to fill, or null; commit by a bulk record that names stage_slot().
  std::byte* stage() noexcept;
  uint32_t stage_slot() const noexcept { return static_cast<uint32_t>(staged_ % kNumStageSlots); }
  void stage_used() noexcept { ++staged_; }

  Pop peek_message(uint32_t& type, Bytes& body) { return in_messages_.peek(type, body); }
  void release_message() noexcept;
  uint64_t messages_end() const noexcept { return in_messages_.end(); }
  bool has_message_before(uint64_t end) const noexcept { return in_messages_.is_before(end); }
  Pop peek_bulk(uint32_t& type, Bytes& body) { return in_bulk_.peek(type, body); }
  void release_bulk() noexcept;
  // A staging slot that a bulk record gave us. They go back in the order in which they came, when
  // the bytes have been copied out; empty: the peer gives more than there are.
  std::optional<uint64_t> take_stage() noexcept;
  void return_stage(uint64_t taken) noexcept;
  const std::byte* peer_stage(uint32_t slot) const noexcept {
    return peer_staging_->data() + size_t{slot} * kStageSlotBytes;
  }
  // `bulk_held`: the record at the bulk ring's head waits for a copier, who will wake us.
  bool prepare_sleep(bool bulk_held) noexcept;
  void awake() noexcept { in_messages_.awake(), in_bulk_.awake(); }
  bool broken() const noexcept {
    return out_bulk_.broken() || broken_.load(std::memory_order_relaxed);
  }

 private:
  struct Queued {
    Type type;
    Bytes body;
  };
  Side& mine() noexcept { return reinterpret_cast<Control*>(control_->data())->side[me_]; }
  Side& theirs() noexcept { return reinterpret_cast<Control*>(control_->data())->side[1 - me_]; }

  std::shared_ptr<Mapping> control_;
  int me_;
  Segment staging_;
  std::shared_ptr<Mapping> peer_staging_;
  Fd my_bell_, peer_bell_;

  std::mutex mutex_;  // over the next two; held for a push of at most 48 KiB
  RingProducer out_messages_;
  std::deque<Queued> queued_;
  // Whether there are some, for a look without the lock. Relaxed: it is stored before `starving` is
  // raised for them, and whoever makes room has seen that, and rings.
  std::atomic<bool> any_queued_{false};
  std::atomic<bool> broken_{false};  // a producer's position made no sense; relaxed: advice to look

  RingProducer out_bulk_;
  uint64_t staged_ = 0;  // slots ever used; the peer's stage_head says how many came back
  RingConsumer in_messages_, in_bulk_;
  uint64_t stages_taken_ = 0, stages_returned_ = 0;
  uint32_t stages_done_ = 0;  // a bit each for those from stages_returned_ on
  static_assert(kNumStageSlots <= 32);
};

}  // namespace kvxfer::shm
