// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/copy_pool.hpp"

#include <algorithm>
#include <utility>

#include "common/cpus.hpp"
#include "common/thread.hpp"

namespace kvxfer {

int CopyPool::threads_for(int configured) noexcept {
  if (configured >= 0) return configured;
  const int cpus = num_usable_cpus();
  return cpus <= 2 ? 0 : std::min(4, cpus / 4);
}

CopyPool::CopyPool(int num_threads) {
  for (int i = 0; i < num_threads; ++i)
    threads_.push_back(start_thread("kvxfer-copy", [this] { run(); }));
}

CopyPool::~CopyPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

CopyClient* CopyPool::next() {
  // Each pass over the round gives every client that may run a quantum, and no chunk is larger.
  for (size_t n = round_.size(); n > 0; --n) {
    CopyClient* client = round_.front();
    if (client->num_running_ < share()) {
      if (client->deficit_ < client->waiting_.front()->nbytes) client->deficit_ += kQuantum;
      client->deficit_ -= client->waiting_.front()->nbytes;
      return client;
    }
    round_.splice(round_.end(), round_, round_.begin());
  }
  return nullptr;
}

void CopyPool::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    CopyClient* client = nullptr;
    work_.wait(lock, [&] { return stopping_ || (client = next()) != nullptr; });
    if (stopping_) return;
    CopyTaskPtr task = std::move(client->waiting_.front());
    client->waiting_.pop_front();
    ++client->num_running_;
    if (client->waiting_.empty()) {
      round_.remove(client);
      client->queued_ = false;
      client->deficit_ = 0;  // who has nothing to copy saves nothing up
    } else if (client->deficit_ < client->waiting_.front()->nbytes) {
      round_.splice(round_.end(), round_, round_.begin());
    }
    lock.unlock();
    task->run();
    lock.lock();
    // Inside the lock: after leave() has seen nobody running, the client may be gone.
    client->done_.push_back(std::move(task));
    client->num_done_.store(client->done_.size(), std::memory_order_relaxed);
    if (client->done_.size() == 1) client->wake_();
    --client->num_running_;
    if (client->queued_) work_.notify_one();  // its share is free again
    left_.notify_all();
  }
}

CopyClient::CopyClient(std::shared_ptr<CopyPool> pool, std::function<void()> wake)
    : pool_(std::move(pool)), wake_(std::move(wake)), max_out_(2 * pool_->share() + 2) {}

CopyClient::~CopyClient() { leave(); }

void CopyClient::submit(CopyTaskPtr task) {
  ++num_out_;
  {
    std::lock_guard lock(pool_->mutex_);
    waiting_.push_back(std::move(task));
    if (!std::exchange(queued_, true)) pool_->round_.push_back(this);
  }
  pool_->work_.notify_one();
}

CopyTaskPtr CopyClient::collect() {
  if (num_done_.load(std::memory_order_relaxed) == 0) return nullptr;
  std::lock_guard lock(pool_->mutex_);
  CopyTaskPtr task = std::move(done_.front());
  done_.pop_front();
  num_done_.store(done_.size(), std::memory_order_relaxed);
  --num_out_;
  return task;
}

void CopyClient::leave() noexcept {
  std::unique_lock lock(pool_->mutex_);
  if (std::exchange(queued_, false)) pool_->round_.remove(this);
  num_out_ -= waiting_.size();
  waiting_.clear();
  pool_->left_.wait(lock, [this] { return num_running_ == 0; });
}

}  // namespace kvxfer
