// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A ring of records between two processes that do not trust each other: one producer, one consumer.
//
// Each side keeps its own position in private memory and only publishes it; what it reads of the
// other's is checked before use. A record is copied out once and validated in the copy, never read
// again.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <span>

#include "common/wire.hpp"

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace kvxfer::shm {

// Tests have both ends in one process, where a segment stands at two addresses. TSan takes the
// atomics at the two for strangers, so it is told what they publish to each other; coarsely, by one
// word for all.
#ifdef __SANITIZE_THREAD__
inline char tsan_bridge = 0;
inline void tsan_publish() noexcept { __tsan_release(&tsan_bridge); }
inline void tsan_observe() noexcept { __tsan_acquire(&tsan_bridge); }
#else
inline void tsan_publish() noexcept {}
inline void tsan_observe() noexcept {}
#endif

// In the control segment. The two halves are on lines of their own: each is written by one side.
struct RingHead {
  // Producer writes, consumer reads: release of the record's bytes.
  alignas(128) std::atomic<uint64_t> tail;
  // Consumer writes, producer reads: release of the room.
  alignas(128) std::atomic<uint64_t> head;
  // Dekker pairs (all seq_cst). The consumer raises `sleeping`, looks at tail again, and sleeps;
  // the producer stores tail, then looks at the flag, and rings the bell. Likewise the producer
  // raises `starving`, looks at head again; the consumer stores head, then looks at the flag.
  alignas(128) std::atomic<uint32_t> sleeping;
  alignas(128) std::atomic<uint32_t> starving;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct RecordHead {
  uint32_t nbytes;  // of the body; kSkip: go to the start of the ring
  uint32_t type;
};
inline constexpr uint32_t kSkip = 0xffffffff;
inline constexpr uint64_t kLine = 64;

enum class Pop : uint8_t { kEmpty, kRecord, kBroken };

class RingProducer {
 public:
  void attach(RingHead* shared, std::byte* data, uint64_t capacity) noexcept {
    shared_ = shared, data_ = data, capacity_ = capacity;
  }
  // The longest body that always finds room in an empty ring, wherever its end stands.
  static constexpr uint64_t max_body(uint64_t capacity) { return capacity / 2 - 64; }

  // False: no room now; `starving` is raised, so the consumer rings when it has made some.
  // broken() afterwards tells whether the consumer's position made sense.
  bool push(uint32_t type, std::span<const ByteView> parts) noexcept {
    uint64_t body = 0;
    for (ByteView part : parts) body += part.size();
    const uint64_t need = align(sizeof(RecordHead) + body);
    if (!fits(need) && !look_and_fits(need)) {
      shared_->starving.store(1, std::memory_order_seq_cst);
      if (!look_and_fits(need)) return false;
      shared_->starving.store(0, std::memory_order_relaxed);
    }
    const uint64_t rest = capacity_ - position(tail_);
    if (rest < need) {
      const RecordHead skip{kSkip, 0};
      std::memcpy(data_ + position(tail_), &skip, sizeof(skip));
      tail_ += rest;
    }
    std::byte* at = data_ + position(tail_);
    const RecordHead head{static_cast<uint32_t>(body), type};
    std::memcpy(at, &head, sizeof(head));
    at += sizeof(head);
    for (ByteView part : parts) {
      if (!part.empty()) std::memcpy(at, part.data(), part.size());
      at += part.size();
    }
    tail_ += need;
    tsan_publish();
    shared_->tail.store(tail_, std::memory_order_seq_cst);
    // The next record's lines become ours while nobody waits for it.
    for (uint64_t ahead = 0; ahead < 4 * kLine; ahead += kLine)
      __builtin_prefetch(data_ + position(tail_ + ahead), 1);
    return true;
  }
  // After a push: true when the consumer sleeps and must be woken (once).
  bool must_ring() noexcept {
    return shared_->sleeping.load(std::memory_order_seq_cst) != 0 &&
           shared_->sleeping.exchange(0, std::memory_order_seq_cst) != 0;
  }
  bool broken() const noexcept { return broken_; }

 private:
  static uint64_t align(uint64_t n) noexcept { return (n + 7) & ~uint64_t{7}; }
  uint64_t position(uint64_t n) const noexcept { return n & (capacity_ - 1); }
  bool fits(uint64_t need) const noexcept {
    const uint64_t rest = capacity_ - position(tail_);
    return capacity_ - (tail_ - head_) >= (rest < need ? rest + need : need);
  }
  bool look_and_fits(uint64_t need) noexcept {
    const uint64_t head = shared_->head.load(std::memory_order_seq_cst);
    tsan_observe();
    if (tail_ - head > capacity_) {
      broken_ = true;
      return false;
    }
    head_ = head;
    return fits(need);
  }

  RingHead* shared_ = nullptr;
  std::byte* data_ = nullptr;
  uint64_t capacity_ = 0;  // a power of two
  uint64_t tail_ = 0;      // ours; the shared one is a copy for the consumer
  uint64_t head_ = 0;      // the consumer's when it was last looked at: that costs a cache miss
  bool broken_ = false;
};

class RingConsumer {
 public:
  void attach(RingHead* shared, const std::byte* data, uint64_t capacity) noexcept {
    shared_ = shared, data_ = data, capacity_ = capacity;
  }
  // Copies the next record's body out. It stays in the ring until release().
  Pop peek(uint32_t& type, Bytes& body) {
    for (;;) {
      const uint64_t ready = shared_->tail.load(std::memory_order_seq_cst) - head_;
      if (ready == 0) return Pop::kEmpty;
      tsan_observe();
      if (ready > capacity_ || ready < sizeof(RecordHead)) return Pop::kBroken;
      const uint64_t rest = capacity_ - (head_ & (capacity_ - 1));
      // All lines of a short record at once, not one miss after the other.
      for (uint64_t ahead = kLine; ahead < 4 * kLine; ahead += kLine)
        __builtin_prefetch(data_ + ((head_ + ahead) & (capacity_ - 1)));
      RecordHead head;
      std::memcpy(&head, data_ + (head_ & (capacity_ - 1)), sizeof(head));
      if (head.nbytes == kSkip) {
        // Nobody skips a whole ring; and who did so again and again would keep us here.
        if (rest > ready || rest == capacity_) return Pop::kBroken;
        head_ += rest;
        continue;
      }
      const uint64_t whole = (sizeof(head) + uint64_t{head.nbytes} + 7) & ~uint64_t{7};
      if (whole > ready || whole > rest) return Pop::kBroken;
      const std::byte* at = data_ + (head_ & (capacity_ - 1)) + sizeof(head);
      body.assign(at, at + head.nbytes);
      type = head.type;
      next_ = head_ + whole;
      return Pop::kRecord;
    }
  }
  // Where what has been pushed by now ends; for is_before(). A peer that refills the ring, or
  // stores a position that it takes back, cannot make it more than one ring full.
  uint64_t end() const noexcept {
    const uint64_t tail = shared_->tail.load(std::memory_order_seq_cst);
    return head_ + std::min(tail - head_, capacity_);
  }
  // Whether something pushed before `end` is yet to be released.
  bool is_before(uint64_t end) const noexcept { return static_cast<int64_t>(end - head_) > 0; }
  // Gives the room of the last peeked record back. True: the producer starves and must be woken.
  bool release() noexcept {
    head_ = next_;
    tsan_publish();
    shared_->head.store(head_, std::memory_order_seq_cst);
    return must_ring();
  }
  // After something the producer may wait for was given back: true when it does.
  bool must_ring() noexcept {
    return shared_->starving.load(std::memory_order_seq_cst) != 0 &&
           shared_->starving.exchange(0, std::memory_order_seq_cst) != 0;
  }
  // Awake again: the producer need not ring. Relaxed: a bell too many does no harm.
  void awake() noexcept { shared_->sleeping.store(0, std::memory_order_relaxed); }
  // Before sleeping. False: something came meanwhile, do not sleep.
  bool prepare_sleep() noexcept {
    shared_->sleeping.store(1, std::memory_order_seq_cst);
    if (shared_->tail.load(std::memory_order_seq_cst) == head_) return true;
    awake();
    return false;
  }

 private:
  RingHead* shared_ = nullptr;
  const std::byte* data_ = nullptr;
  uint64_t capacity_ = 0;
  uint64_t head_ = 0, next_ = 0;
};

}  // namespace kvxfer::shm
