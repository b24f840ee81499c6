// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/reactor.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <cerrno>
#include <csignal>
#include <utility>

#include "common/error.hpp"

namespace kvxfer {
namespace {
constexpr Reactor::Token kEventToken = 1, kTimerToken = 2;
}

Reactor::Reactor()
    : epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) {
  if (!epoll_ || !event_ || !timer_)
    fail_errno(Code::kUnavailable, errno, "cannot create epoll, eventfd and timerfd");
  for (auto [fd, token] : {std::pair{event_.get(), kEventToken}, {timer_.get(), kTimerToken}}) {
    epoll_event event{.events = EPOLLIN, .data = {.u64 = token}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
      fail_errno(Code::kUnavailable, errno, "epoll_ctl failed");
  }
}

Reactor::~Reactor() { stop(); }

void Reactor::start() {
  // Signals belong to the application's threads: a handler must interrupt a waiting main thread.
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &old);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  pthread_setname_np(thread_.native_handle(), "kvxfer");
}

void Reactor::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  wake();
  thread_.join();
}

Reactor::Token Reactor::add(int fd, uint32_t events, std::shared_ptr<FdHandler> handler) {
  Token token;
  {
    std::lock_guard lock(mutex_);
    token = next_token_++;
    handlers_.emplace(token, std::move(handler));
  }
  epoll_event event{.events = events, .data = {.u64 = token}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    const int err = errno;
    std::lock_guard lock(mutex_);
    handlers_.erase(token);
    fail_errno(Code::kUnavailable, err, "epoll_ctl(ADD, ", fd, ") failed");
  }
  return token;
}

void Reactor::remove(Token token, int fd) {
  std::shared_ptr<FdHandler> last;  // destroyed after the lock
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  std::lock_guard lock(mutex_);
  if (auto it = handlers_.find(token); it != handlers_.end()) {
    last = std::move(it->second);
    handlers_.erase(it);
  }
}

void Reactor::post(std::function<void()> task) {
  bool first;
  {
    std::lock_guard lock(mutex_);
    first = tasks_.empty();
    tasks_.push_back(std::move(task));
  }
  if (first) wake();
}

void Reactor::wake() noexcept {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the thread is awake already.
  [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

Reactor::TimerId Reactor::at(int64_t deadline_ns, std::function<void()> task) {
  if (deadline_ns == kNever) return kNoTimer;
  std::lock_guard lock(mutex_);
  const TimerId id{deadline_ns, next_timer_++};
  timers_.emplace(id, std::move(task));
  if (deadline_ns < armed_ns_) {
    armed_ns_ = deadline_ns;
    itimerspec when{};
    when.it_value.tv_sec = deadline_ns / 1'000'000'000;
    when.it_value.tv_nsec = deadline_ns % 1'000'000'000;
    ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
  }
  return id;
}

void Reactor::cancel(TimerId id) {
  std::function<void()> last;  // its captures are destroyed after the lock
  std::lock_guard lock(mutex_);
  if (auto it = timers_.find(id); it != timers_.end()) {
    last = std::move(it->second);
    timers_.erase(it);
    // The timerfd stays armed: one spurious wake-up costs less than a system call per transfer.
  }
}

void Reactor::run_tasks() {
  std::vector<std::function<void()>> tasks;
  {
    std::lock_guard lock(mutex_);
    tasks.swap(tasks_);
  }
  for (auto& task : tasks) task();
}

void Reactor::run_timers() {
  std::vector<std::function<void()>> due;
  {
    std::lock_guard lock(mutex_);
    const int64_t now = now_ns();
    while (!timers_.empty() && timers_.begin()->first.first <= now) {
      due.push_back(std::move(timers_.begin()->second));
      timers_.erase(timers_.begin());
    }
    armed_ns_ = timers_.empty() ? kNever : timers_.begin()->first.first;
    itimerspec when{};  // zero disarms
    if (armed_ns_ != kNever) {
      when.it_value.tv_sec = armed_ns_ / 1'000'000'000;
      when.it_value.tv_nsec = armed_ns_ % 1'000'000'000;
    }
    ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
  }
  for (auto& task : due) task();
}

void Reactor::run() {
  epoll_event events[64];
  while (!stopping_.load(std::memory_order_acquire)) {
    const int n = ::epoll_wait(epoll_.get(), events, 64, -1);
    num_wakeups_.fetch_add(1, std::memory_order_relaxed);
    bool timer = false;
    for (int i = 0; i < n; ++i) {
      const Token token = events[i].data.u64;
      if (token == kEventToken || token == kTimerToken) {
        uint64_t count;
        [[maybe_unused]] const ssize_t got =
            ::read(token == kEventToken ? event_.get() : timer_.get(), &count, sizeof count);
        timer |= token == kTimerToken;
        continue;
      }
      std::shared_ptr<FdHandler> handler;
      {
        std::lock_guard lock(mutex_);
        if (auto it = handlers_.find(token); it != handlers_.end()) handler = it->second;
      }
      if (handler) handler->on_events(events[i].events);
    }
    if (timer) run_timers();
    run_tasks();
  }
  // What close() posted must still end its requests; tasks may post further ones.
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (tasks_.empty()) break;
    }
    run_tasks();
  }
  std::unordered_map<Token, std::shared_ptr<FdHandler>> handlers;
  std::map<TimerId, std::function<void()>> timers;
  std::lock_guard lock(mutex_);
  handlers.swap(handlers_);
  timers.swap(timers_);
}

}  // namespace kvxfer
