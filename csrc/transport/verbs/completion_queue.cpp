// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/completion_queue.hpp"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {
constexpr unsigned kAcknowledgeEvery = 64;  // it takes a lock
}

CompletionQueue::CompletionQueue(std::shared_ptr<Device> device, uint32_t num_entries)
    : device_(std::move(device)) {
  if (num_entries > static_cast<uint32_t>(device_->limits().max_cqe))
    fail(Code::kTransport, device_->name(), " has completion queues of at most ",
         device_->limits().max_cqe, " entries; a connection needs ", num_entries);
  channel_.reset(api().create_comp_channel(device_->context()));
  if (!channel_)
    fail_errno(Code::kTransport, errno, "ibv_create_comp_channel on ", device_->name(), " failed");
  own_descriptor(channel_->fd);
  ::fcntl(channel_->fd, F_SETFL, ::fcntl(channel_->fd, F_GETFL) | O_NONBLOCK);
  cq_.reset(api().create_cq(device_->context(), static_cast<int>(num_entries), nullptr,
                            channel_.get(), 0));
  if (!cq_) {
    const int err = errno;
    disown_descriptor(channel_->fd);
    fail_errno(Code::kTransport, err, "ibv_create_cq(", num_entries, " entries) on ",
               device_->name(), " failed");
  }
}

CompletionQueue::~CompletionQueue() {
  if (!birth_.here()) return;
  if (num_events_ > 0) api().ack_cq_events(cq_.get(), num_events_);
  cq_.reset();
  disown_descriptor(channel_->fd);
}

void CompletionQueue::hear() noexcept {
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  while (api().get_cq_event(channel_.get(), &cq, &context) == 0) ++num_events_;
  if (num_events_ < kAcknowledgeEvery) return;
  api().ack_cq_events(cq_.get(), num_events_);
  num_events_ = 0;
}

}  // namespace kvxfer::verbs
