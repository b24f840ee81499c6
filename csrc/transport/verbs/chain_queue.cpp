// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/chain_queue.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/clock.hpp"
#include "transport/verbs/push_window.hpp"

namespace kvxfer::verbs {
namespace {
constexpr uint32_t kMaxDepth = 512;
constexpr uint32_t kMaxSge = 16;
constexpr uint32_t kMaxInline = 220;
}  // namespace

bool is_requests_own(ibv_wc_status status) noexcept {
  switch (status) {
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_OP_ERR:
      return true;
    default:
      return false;
  }
}

void Chunk::clear() noexcept {
  ops_.clear();
  pieces_.clear();
  nbytes_ = 0;
  job.reset();
  ticket = {};
  words = probe = false;
  window.reset();
  immediate = 0;
  on_gpu = false;
}

uint32_t Chunk::add(uint64_t remote, const Keys& rkeys, std::byte* local, const Keys& lkeys,
                    uint32_t nbytes, uint32_t max_sge) {
  const auto n = static_cast<uint32_t>(std::min<uint64_t>(nbytes, kMaxBytes - nbytes_));
  if (n == 0) return 0;
  const auto address = reinterpret_cast<uint64_t>(local);
  if (!ops_.empty()) {
    // Contiguous over there: one more piece of the same request, or none where it is here as well.
    Op& last = ops_.back();
    if (last.remote + last.nbytes == remote && last.rkeys == rkeys) {
      Piece& piece = pieces_.back();
      const bool follows = piece.lkeys == &lkeys && piece.address + piece.nbytes == address;
      if (follows || last.num_sge < max_sge) {
        if (follows)
          piece.nbytes += n;
        else
          pieces_.push_back({address, n, &lkeys}), ++last.num_sge;
        last.nbytes += n;
        nbytes_ += n;
        return n;
      }
    }
  }
  if (ops_.size() == kMaxRequests) return 0;
  ops_.push_back({remote, n, rkeys, static_cast<uint32_t>(pieces_.size()), 1});
  pieces_.push_back({address, n, &lkeys});
  nbytes_ += n;
  return n;
}

uint32_t ChainQueue::depth(const Device& device) noexcept {
  const int most = std::min(device.limits().max_qp_wr - 1, int{kMaxDepth});
  return most < int{Chunk::kMaxRequests} ? 0 : static_cast<uint32_t>(most);
}

ChainQueue::ChainQueue(std::shared_ptr<Device> device, ibv_cq* cq, size_t rail, Work work)
    : device_(std::move(device)),
      cq_(cq),
      rail_(rail),
      work_(work),
      depth_(depth(*device_)),
      shape_{.max_send = depth_ + 1,
             .max_recv = 0,
             .max_send_sge =
                 static_cast<uint32_t>(std::clamp(device_->limits().max_sge, 1, int{kMaxSge})),
             .max_recv_sge = 0,
             .max_inline = work == Work::kWrite ? kMaxInline : 0},
      chain_(Chunk::kMaxRequests) {}

ChainQueue::~ChainQueue() {
  if (qp_) (void)stop_qp(qp_.get());
}

QpEnd ChainQueue::open() {
  ready_ = false;
  qp_ = make_qp(*device_, cq_, shape_, 0);
  psn_ = random_psn();
  ++epoch_;
  first_error_ = IBV_WC_SUCCESS;
  vendor_error_ = 0;
  post_error_ = 0;
  return {qp_->qp_num, psn_};
}

void ChainQueue::connect(const Route& route, const QpEnd& remote, uint8_t issued) {
  connect_qp(*device_, qp_.get(), route, remote, psn_, 0, issued);
}

bool ChainQueue::has_room() const noexcept {
  return ready_ && num_requests_ + Chunk::kMaxRequests <= depth_ && nbytes_ < kMaxBytesInFlight;
}

void ChainQueue::post(ChunkPtr chunk, bool fence) noexcept {
  const size_t count = chunk->ops_.size();
  sges_.clear();
  for (const Chunk::Piece& piece : chunk->pieces_)
    sges_.push_back({piece.address, piece.nbytes, (*piece.lkeys)[device_->index()]});
  for (size_t i = 0; i < count; ++i) {
    const Chunk::Op& op = chunk->ops_[i];
    ibv_send_wr& wr = chain_[i];
    wr = {};
    wr.wr_id = id(next_, i + 1 == count);
    wr.next = i + 1 < count ? &chain_[i + 1] : nullptr;
    wr.sg_list = sges_.data() + op.first_sge;
    wr.num_sge = static_cast<int>(op.num_sge);
    wr.opcode = work_ == Work::kRead ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
    wr.wr.rdma.remote_addr = op.remote;
    wr.wr.rdma.rkey = chunk->window ? chunk->window->keys[rail_] : op.rkeys[rail_];
    if (op.nbytes <= shape_.max_inline && !chunk->on_gpu) wr.send_flags |= IBV_SEND_INLINE;
    if (i == 0 && fence) wr.send_flags |= IBV_SEND_FENCE;
    if (i + 1 < count) continue;
    wr.send_flags |= IBV_SEND_SIGNALED;
    if (work_ == Work::kRead) continue;
    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    wr.imm_data = htonl(chunk->immediate);
  }
  ibv_send_wr* bad = nullptr;
  post_error_ = ibv_post_send(qp_.get(), chain_.data(), &bad);
  if (post_error_ != 0) ready_ = false;
  chunk->posted_ns = now_ns();
  num_requests_ += count;
  nbytes_ += chunk->nbytes_;
  ++next_;
  in_flight_.push_back(std::move(chunk));
}

ChainQueue::Outcome ChainQueue::on_completion(const ibv_wc& completion) noexcept {
  const uint64_t number = number_of(completion.wr_id);
  if ((number >> 48) != (epoch_ & 0xff) || in_flight_.empty()) return {};  // of one that is gone
  if (completion.status != IBV_WC_SUCCESS) {
    if (chain_status_ == IBV_WC_SUCCESS) chain_status_ = completion.status;
    ready_ = false;
    if (first_error_ == IBV_WC_SUCCESS) {
      first_error_ = completion.status;
      vendor_error_ = completion.vendor_err;
    }
  }
  if ((number & 1) == 0) return {.is_mine = true};  // the chain's last one follows
  Outcome outcome{true, std::move(in_flight_.front()),
                  std::exchange(chain_status_, IBV_WC_SUCCESS)};
  in_flight_.pop_front();
  num_requests_ -= outcome.done->ops_.size();
  nbytes_ -= outcome.done->nbytes_;
  return outcome;
}

bool ChainQueue::stop() noexcept {
  ready_ = false;
  if (!qp_ || stop_qp(qp_.get()) != 0) return false;
  ibv_send_wr wr{}, *bad = nullptr;
  wr.wr_id = marker();
  wr.opcode = IBV_WR_SEND;  // never sent: it is flushed like what is before it
  wr.send_flags = IBV_SEND_SIGNALED;
  return ibv_post_send(qp_.get(), &wr, &bad) == 0;
}

std::deque<ChunkPtr> ChainQueue::close() noexcept {
  ready_ = false;
  qp_.reset();
  ++epoch_;
  num_requests_ = 0;
  nbytes_ = 0;
  chain_status_ = IBV_WC_SUCCESS;
  return std::exchange(in_flight_, {});
}

}  // namespace kvxfer::verbs
