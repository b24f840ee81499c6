// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Where the peer's pushed writes come in: a queue pair of one rail whose only right is
// REMOTE_WRITE, with receives for the immediates of its chains. Nothing is posted on its send queue
// but binds and invalidations, so they wait behind nobody's bulk. Progress thread only.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/verbs/queue_pair.hpp"
#include "transport/verbs/window.hpp"
#include "transport/verbs/work.hpp"

namespace kvxfer::verbs {

class Sink {
 public:
  // Completion queue entries that one on this device needs.
  static uint32_t num_entries(const Device& device) noexcept;

  Sink(std::shared_ptr<Device> device, ibv_cq* cq, size_t rail);
  ~Sink();

  // A fresh queue pair, not connected yet, after close(); its receives are posted. Throws.
  QpEnd open();
  void connect(const Route& route, const QpEnd& remote);  // throws
  bool is_open() const noexcept { return qp_ != nullptr; }
  bool is_connected() const noexcept { return connected_; }
  bool is_running() const noexcept { return !stopped_; }
  bool is_mine(uint32_t number) const noexcept { return qp_ && qp_->qp_num == number; }
  // Receives posted since open(). `credit_due`: so many more than the peer was told of that it must
  // be.
  uint32_t posted() const noexcept { return posted_; }
  bool credit_due() const noexcept { return posted_ - told_ >= num_receives_ / 2; }
  void told() noexcept { told_ = posted_; }
  // errno of a post that failed: it must be replaced. 0: none has.
  int error() const noexcept { return error_; }

  // Binds the window here, or invalidates it; the completion comes as an Op. What has no room
  // waits. False, with the reason: there is no memory window to be had.
  bool bind(const WindowPtr& window, std::string& reason);
  void invalidate(const WindowPtr& window);
  // A memory window that nobody can write through and whose peer has drained; may be bound again.
  void give_back(MwPtr mw) { idle_.push_back(std::move(mw)); }

  struct Op {
    WindowPtr window;
    bool is_bind = false;
  };
  // The operation that this completion is of; none: of a queue pair that is gone.
  std::optional<Op> on_op(const ibv_wc& completion);
  // Whether a receive of ours came back; if whole, it is posted again.
  bool on_arrival(const ibv_wc& completion) noexcept;

  // To ERR. What has landed until then has its completion before is_drained().
  void stop() noexcept;
  void on_marker(const ibv_wc& completion) noexcept;
  bool is_drained() const noexcept { return !marker_due_ && posted_ == completed_; }
  // After every window was taken from it: destroys the queue pair.
  void close() noexcept;

 private:
  uint64_t id(Work work) const noexcept { return work_id(work, epoch_); }
  bool is_current(const ibv_wc& completion) const noexcept {
    return qp_ && number_of(completion.wr_id) == epoch_;
  }
  void flush();
  int post(const Op& op);
  int post_receive() noexcept;

  const std::shared_ptr<Device> device_;
  ibv_cq* const cq_;
  const size_t rail_;
  const uint32_t num_receives_;
  QpShape shape_;
  QpPtr qp_;
  uint32_t psn_ = 0;
  uint64_t epoch_ = 0;
  bool connected_ = false, stopped_ = true, marker_due_ = false;
  int error_ = 0;
  uint32_t posted_ = 0, completed_ = 0, told_ = 0;  // receives
  std::deque<Op> under_way_, waiting_;
  std::vector<MwPtr> idle_;
};

}  // namespace kvxfer::verbs
