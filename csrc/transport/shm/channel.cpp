// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/channel.hpp"

#include <unistd.h>

#include <bit>
#include <utility>

namespace kvxfer::shm {

Channel::Channel(std::shared_ptr<Mapping> control, int me, Segment staging,
                 std::shared_ptr<Mapping> peer_staging, Fd my_bell, Fd peer_bell)
    : control_(std::move(control)),
      me_(me),
      staging_(std::move(staging)),
      peer_staging_(std::move(peer_staging)),
      my_bell_(std::move(my_bell)),
      peer_bell_(std::move(peer_bell)) {
  out_messages_.attach(&mine().messages, mine().message_data, kMessageRingBytes);
  out_bulk_.attach(&mine().bulk, mine().bulk_data, kBulkRingBytes);
  in_messages_.attach(&theirs().messages, theirs().message_data, kMessageRingBytes);
  in_bulk_.attach(&theirs().bulk, theirs().bulk_data, kBulkRingBytes);
  prepare_sleep(false);  // so that the peer's first record rings
}

void Channel::hear_bell() noexcept {
  uint64_t count;
  // EAGAIN only: the bell was heard already.
  [[maybe_unused]] const ssize_t n = ::read(my_bell_.get(), &count, sizeof(count));
}

void Channel::ring() noexcept {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the peer is going to wake anyway.
  [[maybe_unused]] const ssize_t n = ::write(peer_bell_.get(), &one, sizeof(one));
  woke_somebody = true;
}

Channel::Sent Channel::try_message(Type type, std::initializer_list<ByteView> parts) noexcept {
  std::lock_guard lock(mutex_);
  if (!queued_.empty()) return Sent::kNoRoom;
  if (!out_messages_.push(static_cast<uint32_t>(type), {parts.begin(), parts.size()})) {
    if (out_messages_.broken()) broken_.store(true, std::memory_order_relaxed);
    return Sent::kNoRoom;
  }
  return out_messages_.must_ring() ? Sent::kMustRing : Sent::kHeard;
}

void Channel::message(Type type, std::initializer_list<ByteView> parts) {
  const Sent sent = try_message(type, parts);
  if (sent == Sent::kMustRing) ring();
  if (sent != Sent::kNoRoom) return;
  Bytes body;
  for (ByteView part : parts) body.insert(body.end(), part.begin(), part.end());
  {
    std::lock_guard lock(mutex_);
    // An honest peer has a handful under way for each slot, and reads them.
    if (queued_.size() >= kMaxQueued) return broken_.store(true, std::memory_order_relaxed);
    queued_.push_back({type, std::move(body)});
    any_queued_.store(true, std::memory_order_relaxed);
  }
  flush();  // the room may have come between the two
}

void Channel::ring_early() noexcept {
  bool wake;
  {
    std::lock_guard lock(mutex_);
    wake = out_messages_.must_ring();
  }
  if (wake) ring();
}

bool Channel::flush() {
  if (!any_queued_.load(std::memory_order_relaxed)) return false;
  bool some = false, wake = false;
  {
    std::lock_guard lock(mutex_);
    while (!queued_.empty()) {
      const ByteView body = queued_.front().body;
      if (!out_messages_.push(static_cast<uint32_t>(queued_.front().type), {&body, 1})) break;
      queued_.pop_front();
      some = true;
    }
    if (out_messages_.broken()) broken_.store(true, std::memory_order_relaxed);
    any_queued_.store(!queued_.empty(), std::memory_order_relaxed);
    if (some) wake = out_messages_.must_ring();
  }
  if (wake) ring();
  return some;
}

bool Channel::bulk(Type type, std::initializer_list<ByteView> parts) noexcept {
  if (!out_bulk_.push(static_cast<uint32_t>(type), {parts.begin(), parts.size()})) return false;
  if (out_bulk_.must_ring()) ring();
  return true;
}

std::byte* Channel::stage() noexcept {
  const auto free = [this] {
    return staged_ - mine().stage_head.load(std::memory_order_seq_cst) < kNumStageSlots;
  };
  if (!free()) {
    // The peer gives slots back, and then looks at this flag.
    mine().bulk.starving.store(1, std::memory_order_seq_cst);
    if (!free()) return nullptr;
  }
  tsan_observe();
  return staging_.mapping->data() + size_t{stage_slot()} * kStageSlotBytes;
}

void Channel::release_message() noexcept {
  if (in_messages_.release()) ring();
}

void Channel::release_bulk() noexcept {
  if (in_bulk_.release()) ring();
}

std::optional<uint64_t> Channel::take_stage() noexcept {
  if (stages_taken_ - stages_returned_ == kNumStageSlots) return {};
  return stages_taken_++;
}

void Channel::return_stage(uint64_t taken) noexcept {
  stages_done_ |= uint32_t{1} << (taken - stages_returned_);
  const int ready = std::countr_one(stages_done_);
  if (ready == 0) return;
  stages_done_ = ready == 32 ? 0 : stages_done_ >> ready;
  stages_returned_ += static_cast<uint64_t>(ready);
  tsan_publish();
  theirs().stage_head.fetch_add(static_cast<uint64_t>(ready), std::memory_order_seq_cst);
  if (in_bulk_.must_ring()) ring();
}

bool Channel::prepare_sleep(bool bulk_held) noexcept {
  if (in_messages_.prepare_sleep() && (bulk_held || in_bulk_.prepare_sleep())) return true;
  awake();
  return false;
}

}  // namespace kvxfer::shm
