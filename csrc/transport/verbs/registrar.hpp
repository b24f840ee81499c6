// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The thread that registers large regions, one after the other, so that neither who registers one
// nor the progress thread waits for it. It begins with the first of them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

namespace kvxfer::verbs {

class Registrar {
 public:
  class Job {
   public:
    virtual ~Job() = default;
    // Looks at `stop` between two calls of the device, and then gives back what it has.
    virtual void run(const std::atomic<bool>& stop) noexcept = 0;
    virtual void drop() noexcept = 0;  // instead of run()
  };

  Registrar() = default;
  ~Registrar() { stop(); }
  Registrar(const Registrar&) = delete;
  Registrar& operator=(const Registrar&) = delete;

  // Any thread; dropped at once after stop().
  void submit(uint64_t region, std::unique_ptr<Job> job);
  // Drops the region's job, or tells it to stop; returns when it does not run any more. Any thread.
  void drop(uint64_t region) noexcept;
  // Likewise for all of them; the thread has ended when this returns.
  void stop() noexcept;

 private:
  void run();

  std::mutex mutex_;  // over all below; not held while a job runs
  std::condition_variable work_, left_;
  std::deque<std::pair<uint64_t, std::unique_ptr<Job>>> waiting_;
  std::optional<uint64_t> running_;  // of which region
  bool stopping_ = false;
  std::thread thread_;
  // Set under the mutex, read by the job; relaxed: it only asks.
  std::atomic<bool> stop_job_{false};
};

}  // namespace kvxfer::verbs
