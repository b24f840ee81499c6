// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The queue pair of one rail that can carry messages. Of those of a connection one does (Channel),
// the others stand by: connected, with receives for kResume, which makes one of them the next.
// Whoever has left one never uses it again: it is replaced by a fresh one of the next epoch.
#pragma once

#include <memory>

#include "transport/verbs/queue_pair.hpp"
#include "transport/verbs/work.hpp"

namespace kvxfer::verbs {

class ControlPair {
 public:
  // As many kResume as a side may send over one: for its own turn, and for one of the peer's that
  // has gone before it.
  static constexpr uint32_t kResumes = 2;
  // Beside one work request for each buffer: kResume, and the marker of stop().
  static constexpr uint32_t kMoreSends = kResumes + 1;

  ControlPair(std::shared_ptr<Device> device, ibv_cq* cq, uint32_t num_buffers);
  ~ControlPair();
  ControlPair(ControlPair&&) = default;

  // A fresh queue pair, not connected yet, after close(); throws.
  QpEnd open(uint32_t epoch);
  void connect(const Route& route, const QpEnd& remote);  // throws
  bool is_open() const noexcept { return qp_ != nullptr; }
  bool is_ready() const noexcept { return connected_ && !stopping_; }
  bool is_stopping() const noexcept { return stopping_; }
  uint32_t number() const noexcept { return qp_ ? qp_->qp_num : 0; }
  uint32_t lkey(const Keys& lkeys) const noexcept { return lkeys[device_->index()]; }
  uint32_t max_inline() const noexcept { return shape_.max_inline; }
  const Device& device() const noexcept { return *device_; }

  uint64_t id(Work work, uint32_t number) const noexcept {
    return work_id(work, uint64_t{epoch_ & 0xffffff} << 32 | number);
  }
  // Whether it is of this queue pair, and not of one before it.
  bool is_mine(uint64_t id) const noexcept {
    return qp_ != nullptr && number_of(id) >> 32 == (epoch_ & 0xffffff);
  }
  int post_send(ibv_send_wr* chain) noexcept;                 // errno
  int post_receive(uint32_t buffer, ibv_sge where) noexcept;  // errno
  void came_back() noexcept { --num_receives_; }

  // To ERR with a marker behind everything that was posted. False: none will come.
  bool stop() noexcept;
  uint64_t marker() const noexcept { return id(Work::kSendMarker, 0); }
  // Stopped, and every receive has come back as well: between them and the marker is no order.
  bool is_drained() const noexcept { return num_receives_ == 0; }
  void close() noexcept;  // destroys it: nothing is sent or received any more

 private:
  std::shared_ptr<Device> device_;
  ibv_cq* cq_;
  QpShape shape_;
  QpPtr qp_;
  uint32_t psn_ = 0, epoch_ = 0, num_receives_ = 0;
  bool connected_ = false, stopping_ = false;
};

}  // namespace kvxfer::verbs
