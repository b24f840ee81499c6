// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/channel.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {
constexpr uint32_t kMaxInline = 220;
constexpr uint32_t kSignalEvery = 16;  // of unsignalled ones only a later completion tells
constexpr uint32_t kReserve = 1;       // of the peer's buffers, for kCredit
}  // namespace

uint32_t Channel::num_buffers(const Device& device) noexcept {
  // One more work request is the marker of stop().
  const int most = std::min(device.limits().max_qp_wr - 1, int{kMaxBuffers});
  return most < int{kMinBuffers} ? 0 : static_cast<uint32_t>(most);
}

Channel::Channel(std::shared_ptr<Device> device, ibv_cq* cq, uint32_t num_buffers)
    : device_(std::move(device)),
      num_buffers_(num_buffers),
      psn_(random_psn()),
      shape_{.max_send = num_buffers + 1, .max_recv = num_buffers, .max_inline = kMaxInline},
      memory_(size_t{2} * num_buffers * kFragmentBytes),
      mr_(device_->register_memory(memory_.data(), memory_.size(), IBV_ACCESS_LOCAL_WRITE,
                                   "message buffers")),
      qp_(make_qp(*device_, cq, shape_, 0)),
      chain_(num_buffers),
      sges_(num_buffers) {
  for (uint32_t buffer = 0; buffer < num_buffers_; ++buffer)
    if (const int err = post_receive(buffer))
      throw Error(Code::kTransport,
                  cat("ibv_post_recv(buffer ", buffer, ") on ", device_->name(),
                      " failed: ", errno_text(err)),
                  err, "verbs");
  posted_ = told_ = num_buffers_;
}

Channel::~Channel() {
  if (qp_) (void)stop_qp(qp_.get());
}

void Channel::connect(const Route& route, const QpEnd& remote, uint32_t peer_buffers) {
  connect_qp(*device_, qp_.get(), route, remote, psn_, 0, 0);
  std::lock_guard lock(mutex_);
  peer_posted_ = peer_buffers_ = peer_buffers;
}

int Channel::post_receive(uint32_t buffer) noexcept {
  ibv_sge sge{reinterpret_cast<uint64_t>(memory_.data()) + uint64_t{buffer} * kFragmentBytes,
              kFragmentBytes, mr_->lkey};
  ibv_recv_wr wr{};
  wr.wr_id = work_id(Work::kReceive, buffer);
  wr.sg_list = &sge;
  wr.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  return ibv_post_recv(qp_.get(), &wr, &bad);
}

bool Channel::fits(size_t nbytes, uint32_t reserve) const noexcept {
  const auto needed = static_cast<uint32_t>(std::max<size_t>((nbytes + kRoom - 1) / kRoom, 1));
  return needed + reserve <= peer_posted_ - sent_ && needed <= num_buffers_ - (sent_ - completed_);
}

// As one chain with one doorbell. False: the post failed, error() says why.
bool Channel::send(Type type, std::span<const ByteView> parts) noexcept {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  size_t left = nbytes, part = 0, offset = 0;
  uint32_t count = 0;
  const uint32_t first = sent_;
  do {
    const uint32_t number = first + count;
    std::byte* const buffer =
        memory_.data() + size_t{num_buffers_ + number % num_buffers_} * kFragmentBytes;
    const Head head{static_cast<uint32_t>(type), static_cast<uint32_t>(nbytes), posted_, 0};
    std::memcpy(buffer, &head, sizeof head);
    size_t filled = 0;
    while (filled < std::min<size_t>(left, kRoom)) {
      const size_t n = std::min(kRoom - filled, parts[part].size() - offset);
      if (n > 0) std::memcpy(buffer + sizeof head + filled, parts[part].data() + offset, n);
      filled += n;
      offset += n;
      if (offset == parts[part].size()) ++part, offset = 0;
    }
    left -= filled;
    sges_[count] = {reinterpret_cast<uint64_t>(buffer), static_cast<uint32_t>(sizeof head + filled),
                    mr_->lkey};
    ibv_send_wr& wr = chain_[count];
    wr = {};
    wr.wr_id = work_id(Work::kSend, number);
    wr.opcode = IBV_WR_SEND;
    wr.sg_list = &sges_[count];
    wr.num_sge = 1;
    if (sges_[count].length <= shape_.max_inline) wr.send_flags |= IBV_SEND_INLINE;
    if (number % kSignalEvery == kSignalEvery - 1) wr.send_flags |= IBV_SEND_SIGNALED;
    if (count > 0) chain_[count - 1].next = &wr;
    ++count;
  } while (left > 0);
  ibv_send_wr* bad = nullptr;
  sent_ += count;
  told_ = posted_;
  credit_due_.store(false, std::memory_order_relaxed);
  const int err = ibv_post_send(qp_.get(), chain_.data(), &bad);
  if (err == 0) return true;
  // Part of the chain may be under way, so the stream is torn: the connection ends.
  error_.store(err, std::memory_order_relaxed);
  return false;
}

Sent Channel::try_message(Type type, std::initializer_list<ByteView> parts) noexcept {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  std::lock_guard lock(mutex_);
  if (dead_ || error() != 0) return Sent::kBroken;
  if (!queued_.empty() || !fits(nbytes, kReserve)) return Sent::kNoRoom;
  return send(type, {parts.begin(), parts.size()}) ? Sent::kSent : Sent::kBroken;
}

void Channel::message(Type type, std::initializer_list<ByteView> parts) {
  size_t nbytes = 0;
  for (const ByteView& part : parts) nbytes += part.size();
  std::lock_guard lock(mutex_);
  if (dead_ || error() != 0) return;
  if (queued_.empty() && fits(nbytes, kReserve)) {
    (void)send(type, {parts.begin(), parts.size()});
    return;
  }
  Queued queued{type, {}};
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
  while (!dead_ && error() == 0 && !queued_.empty() &&
         fits(queued_.front().body.size(), kReserve)) {
    const ByteView body(queued_.front().body);
    if (!send(queued_.front().type, {&body, 1})) break;
    queued_.pop_front();
    some = true;
  }
  any_queued_.store(!queued_.empty(), std::memory_order_relaxed);
  if (!dead_ && error() == 0 && posted_ - told_ >= num_buffers_ / 2 && fits(0, 0))
    some |= send(Type::kCredit, {});
  return some;
}

bool Channel::is_wide() noexcept {
  std::lock_guard lock(mutex_);
  return !dead_ && queued_.empty() && peer_posted_ - sent_ > peer_buffers_ / 2 &&
         sent_ - completed_ < num_buffers_ / 2;
}

void Channel::on_sent(uint64_t number) noexcept {
  std::lock_guard lock(mutex_);
  completed_ = static_cast<uint32_t>(number) + 1;
}

Heard Channel::on_received(const ibv_wc& completion, Type& type, Bytes& body) {
  const auto buffer = static_cast<uint32_t>(number_of(completion.wr_id));
  const ByteView bytes{memory_.data() + size_t{buffer} * kFragmentBytes,
                       std::min(completion.byte_len, kFragmentBytes)};
  Reader reader(bytes);
  const Head head = reader.get<Head>();
  const ByteView rest = reader.take(reader.remaining());
  if (!reader.ok() || head.nbytes > kMaxMessageBytes) return Heard::kMalformed;
  if (!std::exchange(is_coming_, true)) {
    coming_.clear();
    coming_type_ = head.type;
    coming_nbytes_ = head.nbytes;
  }
  if (head.type != coming_type_ || head.nbytes != coming_nbytes_ ||
      rest.size() != std::min<size_t>(coming_nbytes_ - coming_.size(), kRoom))
    return Heard::kMalformed;
  coming_.insert(coming_.end(), rest.begin(), rest.end());
  {
    std::lock_guard lock(mutex_);
    // First our own buffer, then what the peer tells: whoever sends because of it tells of ours.
    if (!dead_) {
      if (const int err = post_receive(buffer)) error_.store(err, std::memory_order_relaxed);
      ++posted_;
    }
    if (head.posted - sent_ > peer_buffers_) return Heard::kMalformed;
    peer_posted_ = head.posted;
    if (posted_ - told_ >= num_buffers_ / 2) credit_due_.store(true, std::memory_order_relaxed);
  }
  if (coming_.size() < coming_nbytes_) return Heard::kFragment;
  is_coming_ = false;
  type = static_cast<Type>(coming_type_);
  body.swap(coming_);
  return Heard::kMessage;
}

bool Channel::stop() noexcept {
  std::lock_guard lock(mutex_);
  dead_ = true;
  queued_.clear();
  any_queued_.store(false, std::memory_order_relaxed);
  if (!qp_ || stop_qp(qp_.get()) != 0) return false;
  ibv_send_wr wr{}, *bad = nullptr;
  wr.wr_id = work_id(Work::kSendMarker, 0);
  wr.opcode = IBV_WR_SEND;
  wr.send_flags = IBV_SEND_SIGNALED;
  return ibv_post_send(qp_.get(), &wr, &bad) == 0;
}

void Channel::destroy() noexcept {
  std::lock_guard lock(mutex_);
  dead_ = true;
  qp_.reset();
}

}  // namespace kvxfer::verbs
