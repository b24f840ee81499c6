// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One completion queue with the channel that wakes for it. Large enough for every completion that
// can be outstanding, so it is never overrun.
#pragma once

#include <memory>
#include <span>

#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

inline constexpr size_t kMaxCompletions = 32;  // taken at once

class CompletionQueue {
 public:
  CompletionQueue(std::shared_ptr<Device> device, uint32_t num_entries);  // throws
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  ibv_cq* get() const noexcept { return cq_.get(); }
  int fd() const noexcept { return channel_->fd; }
  // How many came; negative: the queue has failed.
  int poll(std::span<ibv_wc> out) noexcept {
    return ibv_poll_cq(cq_.get(), static_cast<int>(out.size()), out.data());
  }
  // From now on the next completion makes fd() readable; what is there already does not. 0 or
  // errno.
  int arm() noexcept { return ibv_req_notify_cq(cq_.get(), 0); }
  void hear() noexcept;  // takes the events; never blocks

 private:
  const std::shared_ptr<Device> device_;
  std::unique_ptr<ibv_comp_channel, Closer<&Api::destroy_comp_channel>> channel_;
  CqPtr cq_;
  unsigned num_events_ = 0;  // taken and not acknowledged; the queue cannot go before they are
  Birth birth_;
};

}  // namespace kvxfer::verbs
