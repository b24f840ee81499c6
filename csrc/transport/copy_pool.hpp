// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Threads that copy chunks for the progress thread, in turn for each connection that has some.
//
// Turns are by deficit round robin, so that bytes and not chunks are shared out; and one connection
// has at most half of the threads, so that another's small request finds one free.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kvxfer {

class CopyTask {
 public:
  virtual ~CopyTask() = default;
  virtual void run() noexcept = 0;
  uint64_t nbytes = 0;
};
using CopyTaskPtr = std::unique_ptr<CopyTask>;

class CopyPool;

// One connection's share of the pool. Used by the holder of the progress token only.
class CopyClient {
 public:
  // `wake` is called by a copier, when there is something to collect after there was nothing.
  CopyClient(std::shared_ptr<CopyPool> pool, std::function<void()> wake);
  ~CopyClient();
  CopyClient(const CopyClient&) = delete;
  CopyClient& operator=(const CopyClient&) = delete;

  // So many chunks are out that the copiers will not starve: cut no more until some are back.
  bool full() const noexcept { return num_out_ >= max_out_; }
  void submit(CopyTaskPtr task);
  CopyTaskPtr collect();  // one that is done, in any order; null: none now
  // Forgets what waits and returns when no copier is inside: one chunk of time at most.
  void leave() noexcept;

 private:
  friend class CopyPool;
  const std::shared_ptr<CopyPool> pool_;
  const std::function<void()> wake_;
  const size_t max_out_;
  size_t num_out_ = 0;  // submitted and not collected
  // Copier to progress thread: how long done_ is. Relaxed: advice to look; the mutex orders.
  std::atomic<size_t> num_done_{0};
  // Under the pool's mutex.
  std::deque<CopyTaskPtr> waiting_, done_;
  uint64_t deficit_ = 0;
  size_t num_running_ = 0;
  bool queued_ = false;  // in the pool's round
};

class CopyPool {
 public:
  explicit CopyPool(int num_threads);  // at least one
  ~CopyPool();
  size_t num_threads() const noexcept { return threads_.size(); }
  size_t share() const noexcept { return (threads_.size() + 1) / 2; }

  // What a configured number means here; negative: as many as this process can spare.
  static int threads_for(int configured) noexcept;

 private:
  friend class CopyClient;
  static constexpr uint64_t kQuantum = 256 * 1024;
  void run();
  CopyClient* next();  // whose turn it is, its task affordable; null: nobody's. mutex_ held

  std::mutex mutex_;  // over all below and the clients' parts; never held across a copy
  std::condition_variable work_, left_;
  std::list<CopyClient*> round_;  // those with waiting tasks
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvxfer
