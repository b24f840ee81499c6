// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The progress token: who polls, who gives way to whom, and that nobody falls asleep over work.
#include <doctest/doctest.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "common/cpus.hpp"
#include "common/wait_word.hpp"
#include "transport/reactor.hpp"

using namespace kvxfer;

namespace {

constexpr int64_t kSpinNs = 60'000'000'000;  // longer than any test: spins end by what they test

struct Running {
  explicit Running(int64_t spin_ns) : reactor(spin_ns) { reactor.start(); }
  ~Running() { reactor.stop(); }
  Reactor reactor;
};

struct Counting final : Pollable {
  bool poll() override {
    by = std::this_thread::get_id();
    ++polls;
    word.notify_all();
    return work.exchange(false);
  }
  bool doze() override {
    ++dozes;
    word.notify_all();
    return !refuse_doze.exchange(false);
  }
  void awake() override {}
  std::atomic<std::thread::id> by{};
  std::atomic<int> polls{0}, dozes{0};
  std::atomic<bool> work{false}, refuse_doze{false};
  WaitWord word;
};

template <typename Look>
bool eventually(WaitWord& word, Look&& look) {
  const int64_t deadline_ns = deadline_after(30);
  for (;;) {
    const uint32_t seen = word.read();
    if (look()) return true;
    if (word.wait(seen, deadline_ns) == Woken::kTimedOut) return look();
  }
}

}  // namespace

TEST_CASE(
    "who waits polls in the progress thread's stead, and lets it doze when it has what it wants") {
  if (num_usable_cpus() < 2) return;
  Running running(kSpinNs);
  const auto what = std::make_shared<Counting>();
  running.reactor.spin_for(what, kNever, [&] { return what->polls >= 3; });
  CHECK(what->by.load() == std::this_thread::get_id());
  CHECK(what->dozes == 1);
  CHECK_FALSE(running.reactor.on_thread());
}

TEST_CASE("what comes while the caller dozes off is left to the progress thread") {
  if (num_usable_cpus() < 2) return;
  Running running(1000);
  const auto what = std::make_shared<Counting>();
  what->refuse_doze = true;
  running.reactor.spin_for(what, kNever, [&] { return what->polls >= 1; });
  CHECK(eventually(what->word, [&] {
    return what->dozes >= 2 && what->by.load() != std::this_thread::get_id();
  }));
}

TEST_CASE("a caller that spins gives way to the progress thread's other work") {
  if (num_usable_cpus() < 2) return;
  Running running(kSpinNs);
  const auto what = std::make_shared<Counting>();
  std::atomic<bool> ran{false};
  std::thread other([&] {
    eventually(what->word, [&] { return what->polls >= 1; });
    running.reactor.post([&] { ran = true; });
  });
  running.reactor.spin_for(what, kNever, [] { return false; });  // for ever, were it not for that
  other.join();
  WaitWord never;
  for (uint32_t i = 0; !ran && i < 30'000; ++i) never.wait(never.read(), deadline_after(0.001));
  CHECK(ran);
}

TEST_CASE("a progress thread that merely spins gives way to a caller") {
  if (num_usable_cpus() < 2) return;
  Running running(kSpinNs);
  const auto what = std::make_shared<Counting>();
  running.reactor.attend(what);
  REQUIRE(eventually(what->word, [&] { return what->polls >= 1; }));
  CHECK(what->by.load() != std::this_thread::get_id());
  // It would spin for a minute; that somebody wants to take over makes it doze.
  bool gave_way = false, polled = false;
  for (const int64_t end_ns = deadline_after(30); !polled && now_ns() < end_ns;)
    running.reactor.spin_for(what, end_ns, [&] {
      gave_way = gave_way || eventually(what->word, [&] { return what->dozes >= 1; });
      return polled = what->by.load() == std::this_thread::get_id();
    });
  CHECK(gave_way);
  CHECK(polled);
}

TEST_CASE("without spinning nobody polls but the progress thread, and it dozes at once") {
  Running running(0);
  const auto what = std::make_shared<Counting>();
  running.reactor.spin_for(what, kNever, [] { return false; });
  CHECK(what->polls == 0);
  what->work = true;
  running.reactor.attend(what);
  CHECK(eventually(what->word, [&] { return what->dozes == 1; }));
  CHECK(what->polls == 2);
}

TEST_CASE("one thread of a process spins") {
  SpinToken one, other;
  CHECK(one.take());
  CHECK_FALSE(other.take());
  one.give();
  CHECK(other.take());
}

namespace {

struct News final : FdHandler {
  News() : fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  void on_events(uint32_t) override {
    uint64_t count;
    [[maybe_unused]] const ssize_t n = ::read(fd.get(), &count, sizeof count);
    by = std::this_thread::get_id();
    word.notify_all();
  }
  void tell() const {
    const uint64_t one = 1;
    REQUIRE(::write(fd.get(), &one, sizeof one) == sizeof one);
  }
  bool heard_here() const { return by.load() == std::this_thread::get_id(); }
  Fd fd;
  std::atomic<std::thread::id> by{};
  WaitWord word;
};

// A reactor that this thread polls until it is lent the work, and a file descriptor in its epoll.
struct Lent {
  Lent() {
    news = std::make_shared<News>();
    token = running.reactor.add(news->fd.get(), EPOLLIN, news);
    poll_until_lent();
  }
  ~Lent() { running.reactor.remove(token, news->fd.get()); }
  void poll_until_lent() {
    news->by = std::thread::id{};
    for (const int64_t end_ns = deadline_after(60); !news->heard_here() && now_ns() < end_ns;) {
      news->tell();
      running.reactor.poll();
    }
    REQUIRE(news->heard_here());
  }
  bool heard_by_progress_thread() {
    news->by = std::thread::id{};
    news->tell();
    return eventually(news->word, [&] { return news->by.load() != std::thread::id{}; }) &&
           !news->heard_here();
  }
  Running running{0};
  std::shared_ptr<News> news;
  Reactor::Token token = 0;
};

}  // namespace

TEST_CASE("who polls without a break is lent the work, and does not come back: it is taken back") {
  Lent lent;
  CHECK(lent.heard_by_progress_thread());
  lent.poll_until_lent();
  CHECK(lent.heard_by_progress_thread());
}

TEST_CASE("who rests gives the work back") {
  Lent lent;
  lent.running.reactor.rest();
  CHECK(lent.heard_by_progress_thread());
}

TEST_CASE("a task that another thread posts does not wait for who was lent the work") {
  std::atomic<bool> ran{false};
  WaitWord word;  // before the reactor: a task may still be inside notify_all()
  Lent lent;
  std::thread other([&] {
    lent.running.reactor.post([&] {
      ran = true;
      word.notify_all();
    });
  });
  CHECK(eventually(word, [&] { return ran.load(); }));
  other.join();
}

TEST_CASE("what a handler posts while the work is lent runs at the next poll, or when it is over") {
  for (const bool polls : {true, false}) {
    struct Posting final : FdHandler {
      std::function<void()> call;
      void on_events(uint32_t) override { call(); }
    };
    std::atomic<int> ran{0};
    WaitWord word;
    News second;
    auto posting = std::make_shared<Posting>();
    Lent lent;
    posting->call = [&] {
      second.on_events(0);
      lent.running.reactor.post([&] {
        ++ran;
        word.notify_all();
      });
    };
    const auto token = lent.running.reactor.add(second.fd.get(), EPOLLIN, posting);
    second.tell();
    while (polls && ran == 0) lent.running.reactor.poll();
    CHECK(eventually(word, [&] { return ran == 1; }));
    lent.running.reactor.remove(token, second.fd.get());
  }
}

TEST_CASE("many threads poll and rest while others have work for them") {
  const auto news = std::make_shared<News>();
  std::atomic<int> ran{0};
  std::atomic<bool> over{false};
  Running running(0);
  const auto token = running.reactor.add(news->fd.get(), EPOLLIN, news);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&, i] {
      for (int k = 0; !over; ++k) {
        running.reactor.poll();
        if (k % 5000 == 1000 * i) running.reactor.rest();
        if (k % 7000 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    });
  constexpr int kTasks = 300;
  for (int k = 0; k < kTasks; ++k) {
    const int before = ran;
    running.reactor.post([&] {
      ++ran;
      news->word.notify_all();
    });
    news->tell();
    REQUIRE(eventually(news->word, [&] { return ran > before; }));
  }
  over = true;
  for (auto& thread : threads) thread.join();
  CHECK(ran == kTasks);
  running.reactor.remove(token, news->fd.get());
}

TEST_CASE("thousands of timers that are due at once leave room for others between them") {
  Running running(0);
  constexpr int kTimers = 2000;
  std::atomic<int> rung{0}, rung_before{-1};
  WaitWord word;
  const int64_t when_ns = now_ns() + 50'000'000;
  for (int i = 0; i < kTimers; ++i) {
    running.reactor.at(when_ns, [&, i] {
      if (i == 0) running.reactor.post([&] { rung_before = rung.load(), word.notify_all(); });
      if (++rung == kTimers) word.notify_all();
    });
  }
  REQUIRE(eventually(word, [&] { return rung == kTimers && rung_before >= 0; }));
  CHECK(rung_before < kTimers / 4);
}

TEST_CASE("an alarm rings unless it is gone or was cancelled, and its place is used again") {
  struct Ringing final : Alarm {
    explicit Ringing(std::atomic<int>& c, WaitWord& w) : count(c), word(w) {}
    void ring(const std::shared_ptr<Alarm>& self) noexcept override {
      CHECK(self.get() == this);
      ++count;
      word.notify_all();
    }
    std::atomic<int>& count;
    WaitWord& word;
  };
  Running running(0);
  std::atomic<int> count{0}, gone{0};
  WaitWord word;
  for (int round = 1; round <= 3; ++round) {
    const auto kept = std::make_shared<Ringing>(count, word);
    const auto cancelled = std::make_shared<Ringing>(gone, word);
    const int64_t when_ns = now_ns() + 10'000'000;
    running.reactor.at(when_ns, std::weak_ptr<Alarm>(std::make_shared<Ringing>(gone, word)));
    const auto id = running.reactor.at(now_ns() + 60'000'000'000, std::weak_ptr<Alarm>(cancelled));
    running.reactor.cancel(id);
    running.reactor.at(when_ns, std::weak_ptr<Alarm>(kept));
    REQUIRE(eventually(word, [&] { return count == round; }));
  }
  CHECK(gone == 0);
}
