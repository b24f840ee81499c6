// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The stream of messages; channel_pairs.cpp has the queue pairs that carry it.
#include "transport/verbs/channel.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

namespace kvxfer::verbs {
namespace {
constexpr uint32_t kSignalEvery = 16;  // of unsignalled ones only a later completion tells
constexpr uint32_t kReserve = 1;       // of the window, for kCredit
}  // namespace

bool Channel::fits(size_t nbytes, uint32_t reserve) const noexcept {
  const auto needed = static_cast<uint32_t>(std::max<size_t>((nbytes + kRoom - 1) / kRoom, 1));
  return needed + reserve <= window_ - (sent_ - acked_) &&
         needed <= num_buffers_ - (sent_ - completed_);
}

// Into the buffers where it stays until the peer has taken it; and out, unless messages are about
// to move: then it goes with what is sent again.
void Channel::send(Type type, std::span<const ByteView> parts) noexcept {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  size_t left = nbytes, part = 0, offset = 0;
  const uint32_t first = sent_;
  do {
    const uint32_t place = place_of(sent_);
    std::byte* const at = buffer(num_buffers_ + place);
    const Head head{static_cast<uint32_t>(type), static_cast<uint32_t>(nbytes), 0, sent_};
    std::memcpy(at, &head, sizeof head);
    size_t filled = 0;
    while (filled < std::min<size_t>(left, kRoom)) {
      const size_t n = std::min(kRoom - filled, parts[part].size() - offset);
      if (n > 0) std::memcpy(at + sizeof head + filled, parts[part].data() + offset, n);
      filled += n;
      offset += n;
      if (offset == parts[part].size()) ++part, offset = 0;
    }
    left -= filled;
    lengths_[place] = static_cast<uint32_t>(sizeof head + filled);
    ++sent_;
  } while (left > 0);
  if (!is_waiting() && error() == 0 && !pairs_[current_].is_stopping()) post_from(first);
}

// As one chain with one doorbell.
void Channel::post_from(uint32_t first) noexcept {
  const uint32_t count = sent_ - first;
  if (count == 0) return;
  ControlPair& pair = pairs_[current_];
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t number = first + i, place = place_of(number);
    std::memcpy(buffer(num_buffers_ + place) + offsetof(Head, received), &received_,
                sizeof received_);
    sges_[i] = sge_of(pair, num_buffers_ + place, lengths_[place]);
    ibv_send_wr& wr = chain_[i];
    wr = {};
    wr.wr_id = pair.id(Work::kSend, number);
    wr.next = i + 1 < count ? &chain_[i + 1] : nullptr;
    wr.opcode = IBV_WR_SEND;
    wr.sg_list = &sges_[i];
    wr.num_sge = 1;
    if (sges_[i].length <= pair.max_inline()) wr.send_flags |= IBV_SEND_INLINE;
    if (number % kSignalEvery == kSignalEvery - 1) wr.send_flags |= IBV_SEND_SIGNALED;
  }
  told_ = received_;
  credit_due_.store(false, std::memory_order_relaxed);
  // Part of a chain that fails may be under way: this queue pair is of no use any more.
  if (const int err = pair.post_send(chain_.data())) error_.store(err, std::memory_order_relaxed);
}

Sent Channel::try_message(Type type, std::initializer_list<ByteView> parts) noexcept {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  std::lock_guard lock(mutex_);
  if (dead_) return Sent::kBroken;
  if (!queued_.empty() || !fits(nbytes, kReserve)) return Sent::kNoRoom;
  send(type, {parts.begin(), parts.size()});
  return Sent::kSent;
}

void Channel::message(Type type, std::initializer_list<ByteView> parts) {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  std::lock_guard lock(mutex_);
  if (dead_) return;
  if (queued_.empty() && fits(nbytes, kReserve)) return send(type, {parts.begin(), parts.size()});
  if (queued_.size() >= kMaxQueued || nbytes > kMaxQueuedBytes - queued_nbytes_)
    return overrun_.store(true, std::memory_order_relaxed);
  queued_nbytes_ += nbytes;
  Message queued{type, {}};
  queued.body.reserve(nbytes);
  for (const ByteView& part : parts)
    queued.body.insert(queued.body.end(), part.begin(), part.end());
  queued_.push_back(std::move(queued));
  any_queued_.store(true, std::memory_order_relaxed);
}

bool Channel::flush() noexcept {
  if (!any_queued_.load(std::memory_order_relaxed) && !credit_due_.load(std::memory_order_relaxed))
    return false;
  bool some = false;
  std::lock_guard lock(mutex_);
  if (dead_) return false;
  while (!queued_.empty() && fits(queued_.front().body.size(), kReserve)) {
    const ByteView body(queued_.front().body);
    send(queued_.front().type, {&body, 1});
    queued_nbytes_ -= body.size();
    queued_.pop_front();
    some = true;
  }
  any_queued_.store(!queued_.empty(), std::memory_order_relaxed);
  // While messages move it is told by kResume.
  if (!is_waiting() && error() == 0 && received_ - told_ >= window_ / 2 && fits(0, 0)) {
    send(Type::kCredit, {});
    some = true;
  }
  return some;
}

bool Channel::is_wide() noexcept {
  std::lock_guard lock(mutex_);
  return !dead_ && !is_waiting() && queued_.empty() && sent_ - acked_ < window_ / 2 &&
         sent_ - completed_ < num_buffers_ / 2;
}

void Channel::shut() noexcept {
  std::lock_guard lock(mutex_);
  dead_ = true;
  queued_.clear();
  queued_nbytes_ = 0;
  any_queued_.store(false, std::memory_order_relaxed);
}

// ---------------------------------------------------------------- what comes

bool Channel::on_completion(size_t rail, const ibv_wc& completion) noexcept {
  std::lock_guard lock(mutex_);
  ControlPair& pair = pairs_[rail];
  if (!pair.is_mine(completion.wr_id)) return true;  // of one that is gone
  const bool receives = work_of(completion.wr_id) == Work::kReceive;
  if (receives) pair.came_back();
  if (completion.status != IBV_WC_SUCCESS) return pair.is_stopping();
  const auto number = static_cast<uint32_t>(number_of(completion.wr_id));
  if (receives)
    on_received(rail, number, completion.byte_len);
  else if (rail == current_ && !is_waiting())
    completed_ = number + 1;
  return true;
}

// Also while its queue pair is being stopped: what has come by then is taken.
void Channel::on_received(size_t rail, uint32_t number, uint32_t nbytes) noexcept {
  ControlPair& pair = pairs_[rail];
  Reader reader(ByteView(buffer(number), std::min(nbytes, kFragmentBytes)));
  const Head head = reader.get<Head>();
  const ByteView rest = reader.take(reader.remaining());
  bool sane = reader.ok();
  if (sane && head.type == static_cast<uint32_t>(Type::kResume)) {
    // Not acted on where we leave it: is_behind() then says that the peer has moved.
    seen_turn_ = std::max(seen_turn_, head.number);
    if (!pair.is_stopping()) resumes_.push_back({rail, head.number, head.received});
  } else if (rail == current_ && !is_waiting()) {
    sane = sane && on_fragment(head, rest);
  } else {
    // It may follow a kResume that came while the queue pair was being stopped: it will be sent
    // again, since it is not among those that we say we have.
    sane = pair.is_stopping();
  }
  if (!sane) malformed_ = true;
  if (sane && !dead_ && !pair.is_stopping()) post_receive(pair, number);
}

bool Channel::on_fragment(const Head& head, ByteView rest) noexcept {
  if (head.number != received_ || head.nbytes > kMaxMessageBytes ||
      head.received - acked_ > sent_ - acked_)
    return false;
  if (!std::exchange(is_coming_, true)) {
    coming_.clear();
    coming_type_ = head.type;
    coming_nbytes_ = head.nbytes;
  }
  if (head.type != coming_type_ || head.nbytes != coming_nbytes_ ||
      rest.size() != std::min<size_t>(coming_nbytes_ - coming_.size(), kRoom))
    return false;
  coming_.insert(coming_.end(), rest.begin(), rest.end());
  ++received_;
  acked_ = head.received;
  if (received_ - told_ >= window_ / 2) credit_due_.store(true, std::memory_order_relaxed);
  if (coming_.size() < coming_nbytes_) return true;
  is_coming_ = false;
  inbox_.push_back({static_cast<Type>(coming_type_), std::move(coming_)});
  coming_ = {};
  return true;
}

Heard Channel::hear(Type& type, Bytes& body) noexcept {
  if (inbox_.empty()) return malformed_ ? Heard::kMalformed : Heard::kNothing;
  type = inbox_.front().type;
  body.swap(inbox_.front().body);
  if (!is_coming_) coming_.swap(inbox_.front().body);  // its memory serves again
  inbox_.pop_front();
  return Heard::kMessage;
}

std::optional<Resume> Channel::next_resume() noexcept {
  if (resumes_.empty()) return {};
  const Resume out = resumes_.front();
  resumes_.pop_front();
  return out;
}

}  // namespace kvxfer::verbs
