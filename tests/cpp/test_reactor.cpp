// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The progress token: who polls, who gives way to whom, and that nobody falls asleep over work.
#include <doctest/doctest.h>

#include <atomic>
#include <thread>

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
