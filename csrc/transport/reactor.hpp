// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine's one progress thread: asleep in epoll on sockets, one eventfd and one timerfd.
// The timerfd is armed only while something is due, so an idle engine never wakes.
//
// "The progress thread" is who holds the progress token. A thread that waits for a transfer may
// take it while the real one sleeps, and does its work for a moment (spin_for). A thread that looks
// for news again and again (poll) is lent all of it: epoll, and rings that need ring no bell.
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

struct epoll_event;

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

// What rings at its time.
class Alarm {
 public:
  virtual ~Alarm() = default;
  virtual void ring(const std::shared_ptr<Alarm>& self) noexcept = 0;  // progress thread
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

  // Runs on the progress thread, in order of posting; what a caller posts that was lent the work
  // runs at the next poll.
  void post(std::function<void()> task);
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
  // The caller looks for news, found none, and may look again at once: does a piece of the progress
  // thread's work if nobody else is at it. Who goes on like this is lent the work; then nothing
  // that comes has to wake a thread. Any thread that holds no lock; never sleeps.
  void poll() noexcept;
  // The caller is about to sleep, or has just made it likely: the progress thread takes back what
  // it lent, at once rather than within two milliseconds.
  void rest() noexcept {
    if (asked_.load(std::memory_order_relaxed) && asked_.exchange(false)) wake();
  }
  // Runs again after the next look at epoll: how a long job gives way to small messages.
  void defer(std::function<void()> task) { post(std::move(task)); }

  TimerId at(int64_t deadline_ns, std::function<void()> task) {  // any thread
    return add_timer(deadline_ns, {std::move(task), {}});
  }
  // Rings unless it is gone by then: for what has a deadline each, without an allocation for it.
  TimerId at(int64_t deadline_ns, std::weak_ptr<Alarm> alarm) {
    return add_timer(deadline_ns, {{}, std::move(alarm)});
  }
  void cancel(TimerId id);  // any thread; the task may be running already

  // Whether the caller is the progress thread, that is, holds the token.
  bool on_thread() const noexcept {
    return holder_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }
  // On the progress thread: whether it is a caller to whom the work was lent, and who may come back
  // with an answer before anything else happens.
  bool lent() const noexcept { return lent_; }
  // Lets who was just woken by this thread have its CPU, where there are too few.
  void step_aside() const noexcept { kvxfer::step_aside(num_cpus_); }
#ifdef KVXFER_TEST_HOOKS
  // Once round all there is to do, in the stead of a progress thread that was never started.
  void round();
#endif
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
  void keep_watch();
  void handle(const epoll_event* events, int n);
  void progress_lock() noexcept;
  bool pass();
  void ask();
  bool poll_attended();
  void run_tasks();
  void run_timers();
  struct Timer {  // one of the two
    std::function<void()> task;
    std::weak_ptr<Alarm> alarm;
  };
  using Timers = std::map<TimerId, Timer>;
  TimerId add_timer(int64_t deadline_ns, Timer timer);
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
  // A caller polls without a break and wants to be lent the work. Cleared by whoever ends that,
  // before the eventfd is written, so that who was woken by it sees it.
  std::atomic<bool> asked_{false};
  // How often it was polled while it was lent; relaxed: the watch looks whether it still grows.
  std::atomic<uint32_t> num_polls_{0};

  // Under the token.
  bool lent_ = false;                            // written by the progress thread alone
  int64_t polled_since_ns_ = 0, polled_ns_ = 0;  // callers poll without a gap since; last at
  uint32_t looks_ = 0;                           // at the attended, since the last one at epoll
  std::vector<std::shared_ptr<Pollable>> attended_;
  int64_t idle_since_ns_ = 0;  // no attended one had work since; 0: some had
  SpinToken spin_;

  std::mutex mutex_;  // over all below; never held while a callback runs
  std::unordered_map<Token, std::shared_ptr<FdHandler>> handlers_;
  std::vector<std::function<void()>> tasks_;
  bool told_ = false;                   // the eventfd says that there are some
  std::atomic<bool> any_tasks_{false};  // for a look without the lock, by who posted them
  Timers timers_;
  std::vector<Timers::node_type> spare_;  // of timers that are gone
  int64_t armed_ns_ = kNever;
  uint64_t next_token_ = 16, next_timer_ = 1;
};

}  // namespace kvxfer
