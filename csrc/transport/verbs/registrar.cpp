// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/registrar.hpp"

#include <algorithm>

#include "common/thread.hpp"

namespace kvxfer::verbs {

void Registrar::submit(uint64_t region, std::unique_ptr<Job> job) {
  {
    std::lock_guard lock(mutex_);
    if (!stopping_) {
      if (!thread_.joinable()) thread_ = start_thread("kvxfer-register", [this] { run(); });
      waiting_.emplace_back(region, std::move(job));
    }
  }
  if (job) return job->drop();
  work_.notify_one();
}

void Registrar::drop(uint64_t region) noexcept {
  std::unique_ptr<Job> job;
  std::unique_lock lock(mutex_);
  const auto it =
      std::ranges::find_if(waiting_, [&](const auto& each) { return each.first == region; });
  if (it != waiting_.end()) {
    job = std::move(it->second);
    waiting_.erase(it);
    lock.unlock();
    return job->drop();
  }
  if (running_ != region) return;
  stop_job_.store(true, std::memory_order_relaxed);
  left_.wait(lock, [&] { return running_ != region; });
}

void Registrar::stop() noexcept {
  std::deque<std::pair<uint64_t, std::unique_ptr<Job>>> waiting;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    stop_job_.store(true, std::memory_order_relaxed);
    waiting.swap(waiting_);
  }
  work_.notify_all();
  for (const auto& [region, job] : waiting) job->drop();
  if (thread_.joinable()) thread_.join();
}

void Registrar::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    if (stopping_) return;
    std::unique_ptr<Job> job = std::move(waiting_.front().second);
    running_ = waiting_.front().first;
    waiting_.pop_front();
    stop_job_.store(false, std::memory_order_relaxed);
    lock.unlock();
    job->run(stop_job_);
    job.reset();  // with the memory that it has kept
    lock.lock();
    running_.reset();
    left_.notify_all();
  }
}

}  // namespace kvxfer::verbs
