// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/reactor.hpp"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/cpus.hpp"
#include "common/error.hpp"
#include "common/thread.hpp"

namespace kvxfer {
namespace {
constexpr Reactor::Token kEventToken = 1, kTimerToken = 2;
constexpr int kMaxEvents = 64;
// Looks at shared memory between two looks at epoll or at the clock: about a microsecond.
constexpr int kLooks = 16;
// A progress thread that merely spins gives way sooner than this; one that works does not.
constexpr int64_t kGiveWayNs = 3'000;
// A caller that finds work after work in the progress thread's stead hands it over at last.
constexpr int64_t kMaxTurnNs = 5'000'000;
// Whoever has polled for this long, without a gap as long as that, is lent the work: it costs two
// wake-ups to lend it and to take it back.
constexpr int64_t kPolledNs = 100'000, kGapNs = 50'000;
// Looks at attended rings between two at epoll, of whoever was lent the work: some microseconds.
constexpr uint32_t kLentLooks = 64;
// How often the progress thread looks whether those to whom it lent its work still do it.
constexpr int kWatchMs = 1;
// Timers that ring before all else gets a look: thousands may be due at once.
constexpr size_t kMaxDue = 64;
// Nodes of timers that are kept for the next ones.
constexpr size_t kMaxSpare = 1024;
}  // namespace

Reactor::Reactor(int64_t spin_ns)
    : epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)),
      spin_ns_(num_usable_cpus() > 1 ? spin_ns : 0),
      num_cpus_(num_usable_cpus()) {
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
  thread_ = start_thread("kvxfer", [this] { run(); });
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
  const bool mine = on_thread() && lent_;
  bool tell;
  {
    std::lock_guard lock(mutex_);
    tell = !told_ && !mine;
    told_ |= tell;
    tasks_.push_back(std::move(task));
    any_tasks_.store(true, std::memory_order_relaxed);
  }
  if (tell) wake();
}

void Reactor::wake() noexcept {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the thread is awake already.
  [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

Reactor::TimerId Reactor::add_timer(int64_t deadline_ns, Timer timer) {
  if (deadline_ns == kNever) return kNoTimer;
  std::lock_guard lock(mutex_);
  const TimerId id{deadline_ns, next_timer_++};
  if (spare_.empty()) {
    timers_.emplace(id, std::move(timer));
  } else {
    Timers::node_type node = std::move(spare_.back());
    spare_.pop_back();
    node.key() = id;
    node.mapped() = std::move(timer);
    timers_.insert(std::move(node));
  }
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
  Timer last;  // its captures are destroyed after the lock
  std::lock_guard lock(mutex_);
  Timers::node_type node = timers_.extract(id);
  if (node.empty()) return;
  last = std::exchange(node.mapped(), {});
  if (spare_.size() < kMaxSpare) spare_.push_back(std::move(node));
  // The timerfd stays armed: one spurious wake-up costs less than a system call per transfer.
}

void Reactor::run_tasks() {
  std::vector<std::function<void()>> tasks;
  {
    std::lock_guard lock(mutex_);
    tasks.swap(tasks_);
    told_ = false;
    any_tasks_.store(false, std::memory_order_relaxed);
  }
  for (auto& task : tasks) task();
}

void Reactor::run_timers() {
  std::vector<Timer> due;
  {
    std::lock_guard lock(mutex_);
    const int64_t now = now_ns();
    while (!timers_.empty() && timers_.begin()->first.first <= now && due.size() < kMaxDue) {
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
  for (Timer& timer : due) {
    if (timer.task)
      timer.task();
    else if (const auto alarm = timer.alarm.lock())
      alarm->ring(alarm);
  }
}

void Reactor::attend(const std::shared_ptr<Pollable>& what) {
  if (!on_thread()) return post([this, what] { attend(what); });
  if (std::exchange(what->attended_, true)) return;
  what->awake();
  attended_.push_back(what);
}

// Once round all that are attended to; true when one had work.
bool Reactor::pass() {
  bool some = false;
  for (size_t i = 0; i < attended_.size(); ++i) some |= attended_[i]->poll();
  return some;
}

// True: look at epoll without sleeping and come again.
bool Reactor::poll_attended() {
  const bool some = pass();
  if (attended_.empty() || some) {
    idle_since_ns_ = 0;
    spin_.give();
    return some;
  }
  if (spin_ns_ > 0 && callers_.load(std::memory_order_relaxed) == 0 && spin_.take()) {
    step_aside();
    const int64_t now = now_ns();
    if (idle_since_ns_ == 0) idle_since_ns_ = now;
    if (now - idle_since_ns_ < spin_ns_) {
      for (int look = 0; look < kLooks && !pass(); ++look) cpu_pause();
      return true;
    }
  }
  idle_since_ns_ = 0;
  spin_.give();
  std::erase_if(attended_, [](const std::shared_ptr<Pollable>& each) {
    return each->doze() && std::exchange(each->attended_, false);
  });
  return !attended_.empty();
}

// The progress thread's own way to the token: it waits, and whoever polls meanwhile gives way.
void Reactor::progress_lock() noexcept {
  wanted_.store(true, std::memory_order_relaxed);
  progress_.lock();
  wanted_.store(false, std::memory_order_relaxed);
  hold();
}

void Reactor::hold() noexcept {
  holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

void Reactor::give() noexcept {
  holder_.store({}, std::memory_order_relaxed);
  progress_.unlock();
}

Reactor::Turn::Turn(Reactor& reactor, const std::shared_ptr<Pollable>& what, int64_t deadline_ns)
    : reactor_(reactor),
      what_(what),
      begin_ns_(now_ns()),
      last_ns_(std::min(deadline_ns, begin_ns_ + kMaxTurnNs)),
      until_ns_(std::min(deadline_ns, begin_ns_ + reactor.spin_ns_)) {
  reactor.step_aside();
  reactor_.callers_.fetch_add(1, std::memory_order_relaxed);
}

bool Reactor::Turn::look() {
  for (int look = 0; look < kLooks; ++look) {
    if (!mine_) {
      // Two who want to spin: the one with the progress token does.
      mine_ = reactor_.progress_.try_lock();
      if (mine_) {
        reactor_.hold();
        what_->awake();
      }
    }
    if (mine_ && spin_.take() && what_->poll()) {
      until_ns_ = std::min(last_ns_, now_ns() + reactor_.spin_ns_);
      return true;
    }
    cpu_pause();
  }
  const int64_t now = now_ns();
  if (now >= until_ns_ || reactor_.wanted_.load(std::memory_order_relaxed)) return false;
  return (mine_ && spin_.take()) || now - begin_ns_ < kGiveWayNs;
}

Reactor::Turn::~Turn() {
  reactor_.callers_.fetch_sub(1, std::memory_order_relaxed);
  if (!mine_) return;
  // One that is attended to stays awake: whoever polls it will let it doze.
  if (!what_->attended_ && !what_->doze())
    reactor_.post([&r = reactor_, what = what_] { r.attend(what); });
  reactor_.give();
}

// Under the token, while the work is not lent: asks for it once the caller has shown patience.
void Reactor::ask() {
  const int64_t now = now_ns();
  if (now - polled_ns_ > kGapNs) polled_since_ns_ = now;
  polled_ns_ = now;
  if (now - polled_since_ns_ < kPolledNs || asked_.load(std::memory_order_relaxed)) return;
  asked_.store(true, std::memory_order_relaxed);
  wake();
}

void Reactor::poll() noexcept {
  if (on_thread()) return;
  // The one at work may stand still because we have its CPU.
  if (wanted_.load(std::memory_order_relaxed) || !progress_.try_lock()) {
    if (num_cpus_ <= 2) ::sched_yield();
    return;
  }
  hold();
  if (lent_ && any_tasks_.load(std::memory_order_relaxed)) run_tasks();
  const bool some = pass();
  if (!lent_) {
    // The progress thread is in epoll, and nobody else looks there: what it has been told, it does.
    ask();
  } else {
    num_polls_.store(num_polls_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    if (!some && (attended_.empty() || ++looks_ >= kLentLooks)) {
      looks_ = 0;
      epoll_event events[kMaxEvents];
      const int n = ::epoll_wait(epoll_.get(), events, kMaxEvents, 0);
      if (n > 0) handle(events, n);
    }
  }
  const bool waits = !lent_ && asked_.load(std::memory_order_relaxed);
  give();
  if (waits) ::sched_yield();  // the progress thread may have to use this CPU before it lends
}

// The progress thread, while others do its work: looks whether they still do. What must not wait
// for them (a task, rest(), stop()) comes by the eventfd, which therefore is read by nobody else.
void Reactor::keep_watch() {
  for (;;) {
    const uint32_t seen = num_polls_.load(std::memory_order_relaxed);
    pollfd told{.fd = event_.get(), .events = POLLIN, .revents = 0};
    if (::poll(&told, 1, kWatchMs) != 0) break;  // EINTR cannot be: signals are blocked
    if (num_polls_.load(std::memory_order_relaxed) == seen) break;
  }
  progress_lock();
  asked_.store(false, std::memory_order_relaxed);
  lent_ = false;
  polled_since_ns_ = polled_ns_ = 0;
  give();
  // What is attended to is polled by us now, and may doze; what came through epoll is still there.
}

// What epoll told, then timers and tasks; by whoever holds the token.
void Reactor::handle(const epoll_event* events, int n) {
  bool timer = false;
  for (int i = 0; i < n; ++i) {
    const Token token = events[i].data.u64;
    if (token == kEventToken || token == kTimerToken) {
      uint64_t count;
      if (token == kEventToken && lent_) continue;  // it wakes the one that keeps watch
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
  if (!lent_) run_tasks();  // a caller's next poll does: what it found is told to it first
}

void Reactor::run() {
  epoll_event events[kMaxEvents];
  bool sleepy = true;
  while (!stopping_.load(std::memory_order_acquire)) {
    const int n = ::epoll_wait(epoll_.get(), events, kMaxEvents, sleepy ? -1 : 0);
    if (sleepy) num_wakeups_.fetch_add(1, std::memory_order_relaxed);
    progress_lock();
    handle(events, n);
    // Before anything dozes: what is lent stays awake.
    const bool lend = lent_ = asked_.load(std::memory_order_relaxed);
    if (lend) {
      spin_.give();
    } else {
      sleepy = !poll_attended();
    }
    give();
    if (lend) {
      keep_watch();
      sleepy = false;
    }
  }
  progress_lock();
  // What close() posted must still end its requests; tasks may post further ones.
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (tasks_.empty()) break;
    }
    run_tasks();
  }
  const auto attended = std::move(attended_);
  std::unordered_map<Token, std::shared_ptr<FdHandler>> handlers;
  Timers timers;
  give();
  std::lock_guard lock(mutex_);
  handlers.swap(handlers_);
  timers.swap(timers_);
}

#ifdef KVXFER_TEST_HOOKS
void Reactor::round() {
  epoll_event events[kMaxEvents];
  const int n = ::epoll_wait(epoll_.get(), events, kMaxEvents, 0);
  progress_lock();
  handle(events, n);
  run_timers();  // time that was skipped rings no timerfd
  (void)poll_attended();
  give();
}
#endif

}  // namespace kvxfer
