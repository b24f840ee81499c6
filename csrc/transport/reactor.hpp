// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine's one progress thread: asleep in epoll on sockets, one eventfd and one timerfd.
// The timerfd is armed only while something is due, so an idle engine never wakes.
//
// "The progress thread" is who holds the progress token. A thread that waits for a transfer may
// take it while the real one sleeps, and does its work for a moment (spin_for).
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
#include "common/spin.hpp"

namespace kvxfer {

class FdHandler {
 public:
  virtual ~FdHandler() = default;
  virtual void on_events(uint32_t events) = 0;  // on the progress thread; must not throw
};

// Work that comes through shared memory. All on the progress thread.
class Pollable {
 public:
  virtual ~Pollable() = default;
  virtual bool poll() = 0;  // a bounded piece of work; false: there was none
  // Going to sleep: from now on whoever has work for us wakes us. False: there is some already.
  virtual bool doze() = 0;
  virtual void awake() = 0;  // they need not, for a while

 private:
  friend class Reactor;
  bool attended_ = false;
};

class Reactor {
 public:
  using Token = uint64_t;  // never reused, so a late event of a closed fd finds nobody
  using TimerId = std::pair<int64_t, uint64_t>;
  static constexpr TimerId kNoTimer{kNever, 0};

  // `spin_ns`: for how long the progress thread and waiters look before they sleep; 0: not at all.
  explicit Reactor(int64_t spin_ns = 0);
  ~Reactor();
  void start();
  void stop();  // joins; any thread but the progress thread; idempotent

  // Any thread. The handler lives until remove() and the end of a running callback.
  Token add(int fd, uint32_t events, std::shared_ptr<FdHandler> handler);
  void remove(Token token, int fd);  // before the fd is closed

  void post(std::function<void()> task);  // runs on the progress thread, in order of posting
  // Polls it, between looks at epoll, until it has nothing to do and has dozed off. Any thread.
  void attend(const std::shared_ptr<Pollable>& what);
  // The caller waits for `done`, a plain look at an atomic: spins for the configured time at most,
  // polling `what` in the progress thread's stead. Any thread that holds no lock.
  template <typename Done>
  void spin_for(const std::shared_ptr<Pollable>& what, int64_t deadline_ns, Done&& done) {
    if (!spins()) return;
    Turn turn(*this, what, deadline_ns);
    while (!done() && turn.look()) {
    }
  }
  bool spins() const noexcept { return spin_ns_ > 0; }
  // Runs again after the next look at epoll: how a long job gives way to small messages.
  void defer(std::function<void()> task) { post(std::move(task)); }

  TimerId at(int64_t deadline_ns, std::function<void()> task);  // any thread
  void cancel(TimerId id);  // any thread; the task may be running already

  // Whether the caller is the progress thread, that is, holds the token.
  bool on_thread() const noexcept {
    return holder_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }
  uint64_t num_wakeups() const noexcept { return num_wakeups_.load(std::memory_order_relaxed); }

 private:
  // A waiting caller's time with the progress token.
  class Turn {
   public:
    Turn(Reactor& reactor, const std::shared_ptr<Pollable>& what, int64_t deadline_ns);
    ~Turn();
    bool look();  // false: the time is over, go to sleep

   private:
    Reactor& reactor_;
    const std::shared_ptr<Pollable>& what_;
    const int64_t begin_ns_, last_ns_;
    int64_t until_ns_;
    SpinToken spin_;
    bool mine_ = false;
  };
  void hold() noexcept;  // the token is ours
  void give() noexcept;
  void run();
  bool poll_attended();
  void run_tasks();
  void run_timers();
  void wake() noexcept;

  Fd epoll_, event_, timer_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> num_wakeups_{0};
  const int64_t spin_ns_;
  const int num_cpus_;

  // The progress token: everything that is said to happen on the progress thread.
  std::mutex progress_;
  // Who holds it. Written by the holder; relaxed: only equal to the reader's id if it wrote it.
  std::atomic<std::thread::id> holder_{};
  // Advice to whoever spins with the token, all relaxed: the progress thread has work to do;
  // callers want to spin in its stead.
  std::atomic<bool> wanted_{false};
  std::atomic<uint32_t> callers_{0};
  // Under the token.
  std::vector<std::shared_ptr<Pollable>> attended_;
  int64_t idle_since_ns_ = 0;  // no attended one had work since; 0: some had
  SpinToken spin_;

  std::mutex mutex_;  // over the four below; never held while a callback runs
  std::unordered_map<Token, std::shared_ptr<FdHandler>> handlers_;
  std::vector<std::function<void()>> tasks_;
  std::map<TimerId, std::function<void()>> timers_;
  int64_t armed_ns_ = kNever;
  uint64_t next_token_ = 16, next_timer_ = 1;
};

}  // namespace kvxfer
