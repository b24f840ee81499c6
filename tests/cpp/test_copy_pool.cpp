// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The copy pool: turns, shares, and that nobody is inside after leave().
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "common/clock.hpp"
#include "common/wait_word.hpp"
#include "transport/copy_pool.hpp"

using namespace kvxfer;

namespace {

constexpr uint64_t kChunk = 256 * 1024;

struct Bench {
  std::mutex mutex;
  std::vector<int> order;  // who ran
  std::atomic<int> inside{0}, destroyed{0};
  std::atomic<bool> parked{false};
  WaitWord word;

  bool wait(auto&& look) {
    const int64_t deadline_ns = deadline_after(30);
    for (;;) {
      const uint32_t seen = word.read();
      if (look()) return true;
      if (word.wait(seen, deadline_ns) == Woken::kTimedOut) return look();
    }
  }
  void release() {
    parked = false;
    word.notify_all();
  }
};

struct Step final : CopyTask {
  Step(Bench& b, int w, uint64_t n) : bench(b), who(w) { nbytes = n; }
  ~Step() override {
    ++bench.destroyed;
    bench.word.notify_all();
  }
  void run() noexcept override {
    ++bench.inside;
    {
      std::lock_guard lock(bench.mutex);
      bench.order.push_back(who);
    }
    bench.word.notify_all();
    bench.wait([&] { return !bench.parked; });
    --bench.inside;
  }
  Bench& bench;
  const int who;
};

std::unique_ptr<CopyClient> client(const std::shared_ptr<CopyPool>& pool, Bench& bench) {
  return std::make_unique<CopyClient>(pool, [&bench] { bench.word.notify_all(); });
}

int collect(CopyClient& from, Bench& bench, int wanted) {
  int got = 0;
  bench.wait([&] {
    while (from.collect()) ++got;
    return got >= wanted;
  });
  return got;
}

}  // namespace

TEST_CASE("all that is submitted is run once and comes back") {
  Bench bench;
  auto pool = std::make_shared<CopyPool>(3);
  auto a = client(pool, bench), b = client(pool, bench);
  int sent = 0, back = 0;
  while (back < 500) {
    while (sent < 500 && !a->full()) a->submit(std::make_unique<Step>(bench, 0, kChunk)), ++sent;
    const int some = collect(*a, bench, 1);
    REQUIRE(some >= 1);
    back += some;
  }
  CHECK(bench.order.size() == 500);
  CHECK_FALSE(a->full());
}

TEST_CASE("one connection has at most half of the pool, so another finds a thread free") {
  Bench bench;
  bench.parked = true;
  auto pool = std::make_shared<CopyPool>(4);
  auto greedy = client(pool, bench), small = client(pool, bench);
  while (!greedy->full()) greedy->submit(std::make_unique<Step>(bench, 0, kChunk));
  CHECK(bench.wait([&] { return bench.inside == 2; }));
  small->submit(std::make_unique<Step>(bench, 1, 64));
  CHECK(bench.wait([&] { return bench.inside == 3; }));
  {
    std::lock_guard lock(bench.mutex);
    CHECK(std::ranges::count(bench.order, 0) == 2);
    CHECK(std::ranges::count(bench.order, 1) == 1);
  }
  bench.release();
  CHECK(collect(*small, bench, 1) == 1);
}

TEST_CASE("turns are by bytes: small chunks do not wait for as many large ones") {
  Bench bench;
  bench.parked = true;
  auto pool = std::make_shared<CopyPool>(1);
  auto gate = client(pool, bench), large = client(pool, bench), small = client(pool, bench);
  gate->submit(std::make_unique<Step>(bench, 2, 1));  // holds the thread until all stand in line
  REQUIRE(bench.wait([&] { return bench.inside == 1; }));
  for (int i = 0; i < 4; ++i) large->submit(std::make_unique<Step>(bench, 0, kChunk));
  for (int i = 0; i < 4; ++i) small->submit(std::make_unique<Step>(bench, 1, kChunk / 8));
  bench.release();
  CHECK(collect(*large, bench, 4) == 4);
  CHECK(collect(*small, bench, 4) == 4);
  // One quantum is one large chunk, or all of the small ones.
  CHECK(bench.order == std::vector<int>{2, 0, 1, 1, 1, 1, 0, 0, 0});
}

TEST_CASE("leave forgets what waits, and returns when the last copier has left") {
  Bench bench;
  bench.parked = true;
  auto pool = std::make_shared<CopyPool>(2);
  auto leaving = client(pool, bench);
  int sent = 0;
  for (; !leaving->full(); ++sent) leaving->submit(std::make_unique<Step>(bench, 0, kChunk));
  REQUIRE(bench.wait([&] { return bench.inside == 1; }));
  std::atomic<int> inside_after{-1};
  std::thread thread([&] {
    leaving->leave();
    inside_after = bench.inside.load();
  });
  REQUIRE(bench.wait([&] { return bench.destroyed == sent - 1; }));
  CHECK(inside_after == -1);
  bench.release();
  thread.join();
  CHECK(inside_after == 0);
  CHECK(bench.order.size() == 1);
  CHECK(collect(*leaving, bench, 1) == 1);  // the one that was inside
}

TEST_CASE("a configured number of copiers is taken as it is") {
  CHECK(CopyPool::threads_for(0) == 0);
  CHECK(CopyPool::threads_for(7) == 7);
  CHECK(CopyPool::threads_for(-1) <= 4);
}
