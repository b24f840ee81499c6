// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The queue pairs that carry messages, one after the other.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "common/error.hpp"
#include "transport/verbs/channel.hpp"

namespace kvxfer::verbs {

uint32_t Channel::num_buffers(const Device& device) noexcept {
  const int more = ControlPair::kMoreSends;
  const int most = std::min(device.limits().max_qp_wr - more, int{kMaxBuffers});
  return most < int{kMinBuffers} ? 0 : static_cast<uint32_t>(most);
}

uint32_t Channel::num_buffers(const Devices& devices) noexcept {
  uint32_t least = std::numeric_limits<uint32_t>::max();
  for (const auto& device : devices) least = std::min(least, num_buffers(*device));
  return least;
}

Channel::Channel(const Devices& devices, std::span<ibv_cq* const> queues)
    : num_buffers_(num_buffers(devices)),
      memory_(size_t{kFragmentBytes} * first_of(devices.size())),
      registration_(devices, memory_.data(), memory_.size(), IBV_ACCESS_LOCAL_WRITE,
                    "message buffers"),
      chain_(num_buffers_),
      sges_(num_buffers_) {
  pairs_.reserve(devices.size());
  for (size_t rail = 0; rail < devices.size(); ++rail)
    pairs_.emplace_back(devices[rail], queues[rail], num_buffers_);
}

// The first bytes go over the first rail, without a kResume.
void Channel::begin(uint32_t peer_buffers) {
  std::lock_guard lock(mutex_);
  window_ = std::min(num_buffers_, peer_buffers);
  current_ = 0;
  for (uint32_t number = 0; number < num_buffers_; ++number) post_receive(pairs_[0], number);
  if (const int err = error())
    throw Error(Code::kTransport,
                cat("ibv_post_recv of message buffers on ", pairs_[0].device().name(),
                    " failed: ", errno_text(err)),
                err, "verbs");
}

void Channel::post_receive(ControlPair& pair, uint32_t number) noexcept {
  if (const int err = pair.post_receive(number, sge_of(pair, number, kFragmentBytes)))
    error_.store(err, std::memory_order_relaxed);
}

QpEnd Channel::open(size_t rail, uint32_t epoch) {
  std::lock_guard lock(mutex_);
  ControlPair& pair = pairs_[rail];
  const QpEnd end = pair.open(epoch);
  for (uint32_t i = 0; i < ControlPair::kResumes; ++i) {
    const uint32_t number = first_of(rail) + i;
    if (const int err = pair.post_receive(number, sge_of(pair, number, kFragmentBytes))) {
      pair.close();
      throw Error(Code::kTransport,
                  cat("ibv_post_recv(buffer ", number, ") on ", pair.device().name(),
                      " failed: ", errno_text(err)),
                  err, "verbs");
    }
  }
  return end;
}

void Channel::connect(size_t rail, const Route& route, const QpEnd& remote) {
  std::lock_guard lock(mutex_);
  pairs_[rail].connect(route, remote);
}

bool Channel::stop(size_t rail) noexcept {
  std::lock_guard lock(mutex_);
  return pairs_[rail].stop();
}

void Channel::close(size_t rail) noexcept {
  std::lock_guard lock(mutex_);
  pairs_[rail].close();
  if (current_ != rail) return;
  current_ = kNoRail;
  resumed_.store(false, std::memory_order_relaxed);
}

uint32_t Channel::next_turn(bool connecting) const noexcept {
  const uint32_t next = std::max(turn_, seen_turn_) + 1;
  return next % 2 == (connecting ? 1 : 0) ? next : next + 1;
}

void Channel::carry_on(size_t rail, uint32_t turn) noexcept {
  std::lock_guard lock(mutex_);
  ControlPair& pair = pairs_[rail];
  if (current_ != rail) {
    // All of them are ours again: the queue pair that had them is gone.
    error_.store(0, std::memory_order_relaxed);
    current_ = rail;
    for (uint32_t number = 0; number < num_buffers_; ++number) post_receive(pair, number);
    rail_.store(rail, std::memory_order_relaxed);
    num_moves_.fetch_add(1, std::memory_order_relaxed);
  }
  turn_ = turn;
  told_ = received_;
  credit_due_.store(false, std::memory_order_relaxed);
  // A second one for a better turn must not be written over the first.
  const uint32_t place = first_of(rail) + ControlPair::kResumes;
  std::byte* const at = buffer(place) + (turn % 2) * sizeof(Head);
  const Head head{static_cast<uint32_t>(Type::kResume), 0, received_, turn};
  std::memcpy(at, &head, sizeof head);
  ibv_sge sge = sge_of(pair, place, sizeof head);
  sge.addr = reinterpret_cast<uint64_t>(at);
  ibv_send_wr wr{};
  wr.wr_id = pair.id(Work::kSend, 0);
  wr.opcode = IBV_WR_SEND;
  wr.sg_list = &sge;
  wr.num_sge = 1;
  if (sge.length <= pair.max_inline()) wr.send_flags |= IBV_SEND_INLINE;
  if (const int err = pair.post_send(&wr)) error_.store(err, std::memory_order_relaxed);
}

bool Channel::resume(const Resume& peer) noexcept {
  std::lock_guard lock(mutex_);
  if (peer.rail != current_ || !is_waiting() || peer.received - acked_ > sent_ - acked_)
    return false;
  acked_ = completed_ = peer.received;
  resumed_.store(true, std::memory_order_relaxed);
  if (error() == 0) post_from(acked_);
  return true;
}

}  // namespace kvxfer::verbs
