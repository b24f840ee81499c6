// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine's one progress thread: asleep in epoll on sockets, one eventfd and one timerfd.
// The timerfd is armed only while something is due, so an idle engine never wakes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "common/clock.hpp"
#include "common/fd.hpp"

namespace kvxfer {

class FdHandler {
 public:
  virtual ~FdHandler() = default;
  virtual void on_events(uint32_t events) = 0;  // on the progress thread; must not throw
};

class Reactor {
 public:
  using Token = uint64_t;  // never reused, so a late event of a closed fd finds nobody
  using TimerId = std::pair<int64_t, uint64_t>;
  static constexpr TimerId kNoTimer{kNever, 0};

  Reactor();
  ~Reactor();
  void start();
  void stop();  // joins; any thread but the progress thread; idempotent

  // Any thread. The handler lives until remove() and the end of a running callback.
  Token add(int fd, uint32_t events, std::shared_ptr<FdHandler> handler);
  void remove(Token token, int fd);  // before the fd is closed

  void post(std::function<void()> task);  // runs on the progress thread, in order of posting
  // Runs again after the next look at epoll: how a long job gives way to small messages.
  void defer(std::function<void()> task) { post(std::move(task)); }

  TimerId at(int64_t deadline_ns, std::function<void()> task);  // any thread
  void cancel(TimerId id);  // any thread; the task may be running already

  bool on_thread() const noexcept { return std::this_thread::get_id() == thread_.get_id(); }
  uint64_t num_wakeups() const noexcept { return num_wakeups_.load(std::memory_order_relaxed); }

 private:
  void run();
  void run_tasks();
  void run_timers();
  void wake() noexcept;

  Fd epoll_, event_, timer_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> num_wakeups_{0};

  std::mutex mutex_;  // over the four below; never held while a callback runs
  std::unordered_map<Token, std::shared_ptr<FdHandler>> handlers_;
  std::vector<std::function<void()>> tasks_;
  std::map<TimerId, std::function<void()>> timers_;
  int64_t armed_ns_ = kNever;
  uint64_t next_token_ = 16, next_timer_ = 1;
};

}  // namespace kvxfer
