// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines in one process: the paths where threads meet, for the sanitizers. Once per transport:
// ctest sets KVXFER_TEST_TRANSPORT, KVXFER_TEST_SHARE=never to have shm stage what it could map,
// and KVXFER_TEST_COPY_THREADS.
#include <cstring>
#include <random>
#include <thread>

#include "engine_pair.hpp"

using namespace kvxfer;

TEST_CASE("a write and a read move the bytes, over IPv4 and IPv6") {
  for (const char* listen : {"127.0.0.1:0", "[::1]:0"}) {
    Pair pair(1 << 22, listen);
    for (size_t i = 0; i < pair.ra->nbytes; ++i) *pair.at_a(i) = std::byte(i * 7 + i / 251);
    finish(pair.move(Op::kWrite, 0, 0, 3'000'001));
    CHECK(std::memcmp(pair.at_a(0), pair.at_b(0), 3'000'001) == 0);
    CHECK(*pair.at_b(3'000'001) == std::byte{0});
    std::memset(pair.at_a(0), 0, pair.ra->nbytes);
    finish(pair.move(Op::kRead, 5, 9, 2'500'000));
    CHECK(std::memcmp(pair.at_a(5), pair.at_b(9), 2'500'000) == 0);
  }
}

TEST_CASE("many threads submit at once, every transfer ends once") {
  Pair pair;
  constexpr int kThreads = 4, kEach = 200;
  std::vector<std::thread> threads;
  std::atomic<int> done{0};
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      std::mt19937 rng(static_cast<unsigned>(i));
      std::vector<TransferPtr> mine;
      for (int k = 0; k < kEach; ++k) {
        const int64_t offset = (i * kEach + k) * 4096;
        SubmitOptions options;
        options.has_notify = rng() % 2;
        options.has_arrival = true;
        options.arrival = 1;
        mine.push_back(
            pair.move(rng() % 4 ? Op::kWrite : Op::kRead, offset, offset, 4096, options));
      }
      for (auto& t : mine)
        done += t->wait(deadline_after(60)) == Woken::kNotified && t->state == State::kDone;
    });
  std::thread drain([&] {
    while (done < kThreads * kEach) {
      pair.b->notifications();
      std::this_thread::yield();
    }
  });
  for (auto& thread : threads) thread.join();
  CHECK(done == kThreads * kEach);
  done = kThreads * kEach;  // also after a failure
  drain.join();
  PeerPtr from_a;
  for (auto& event : pair.b->peer_events()) from_a = event.peer;
  REQUIRE(from_a);
  CHECK(pair.b->arrivals(1, *from_a) == kThreads * kEach);
}

TEST_CASE("after revoke was quiet not a byte changes, however many writes are on their way") {
  Pair pair;
  for (int round = 0; round < 30; ++round) {
    LeasePtr lease = pair.grant(0, 1 << 22, 64);
    std::memset(pair.at_a(0), round + 1, 1 << 22);
    std::vector<TransferPtr> writes;
    for (uint64_t i = 0; i < 8; ++i) {
      SubmitOptions options = under(lease);
      options.has_arrival = true, options.arrival = i;
      writes.push_back(pair.move(Op::kWrite, static_cast<int64_t>(i) << 19,
                                 static_cast<int64_t>(i) << 19, 1 << 19, options));
    }
    for (int spin = 0; spin < round * 300; ++spin) std::this_thread::yield();
    pair.b->begin_revoke(lease);
    REQUIRE(lease->gate.wait_quiet(deadline_after(10)) == Woken::kNotified);
    std::memset(pair.at_b(0), 0xee, 1 << 22);  // the owner reuses its memory at once
    const uint64_t arrived = lease->num_arrived;
    int refused = 0;
    for (auto& t : writes) {
      REQUIRE(t->wait(deadline_after(30)) == Woken::kNotified);
      if (t->state == State::kDone) continue;
      ++refused;
      CHECK(t->failure.code == Code::kLease);
    }
    CHECK(lease->num_arrived == arrived);
    CHECK(8 - refused == static_cast<int>(arrived));
    CHECK(all_equal(pair.at_b(0), 1 << 22, 0xee));
  }
}

TEST_CASE("a cancelled write is never accepted afterwards, and its retry is not overtaken") {
  Pair pair;
  int cancelled = 0;
  // Where the write is quicker than this thread, it takes more of them until a cancel is in time.
  for (int round = 0; round < 30 || (cancelled == 0 && round < 3000); ++round) {
    LeasePtr lease = pair.grant(0, 1 << 22, 2);
    std::memset(pair.at_a(0), 0x11, 1 << 22);
    SubmitOptions options = under(lease);
    options.has_arrival = true, options.arrival = 0;
    TransferPtr first = pair.move(Op::kWrite, 0, 0, 1 << 22, options);
    for (int spin = 0; spin < (round % 10) * 200; ++spin) std::this_thread::yield();
    pair.a->cancel(first);
    REQUIRE(first->wait(deadline_after(10)) == Woken::kNotified);
    cancelled += first->state == State::kCancelled;
    while (!first->quiesced) std::this_thread::yield();
    std::memset(pair.at_a(0), 0x22, 1 << 22);  // quiesced: the source is ours again
    options.arrival = 1;
    finish(pair.move(Op::kWrite, 0, 0, 1 << 22, options));
    CHECK(all_equal(pair.at_b(0), 1 << 22, 0x22));
    CHECK(lease->arrived(1));
  }
  CHECK(cancelled > 0);
  for (int spin = 0; pair.a->stats().unquiesced != 0 && spin < 1'000'000; ++spin)
    std::this_thread::yield();
  CHECK(pair.a->stats().unquiesced == 0);
  CHECK(pair.a->stats().in_flight == 0);
}

TEST_CASE("cancelled notifications give their credit back") {
  Pair pair;
  for (int i = 0; i < 2000; ++i) {
    SubmitOptions options;
    options.has_notify = true;
    options.notify = Bytes(100);
    options.deadline_ns = deadline_after(30);
    TransferPtr t = pair.a->notify(pair.to_b, options);
    pair.a->cancel(t);
    REQUIRE(t->wait(deadline_after(10)) == Woken::kNotified);
    pair.b->notifications();
  }
  SubmitOptions options;
  options.has_notify = true;
  options.deadline_ns = deadline_after(30);
  TransferPtr last = pair.a->notify(pair.to_b, options);
  finish(last);
}

TEST_CASE("an undrained application stops its peer by credits, not by memory") {
  Pair pair;
  std::vector<TransferPtr> sent;
  for (uint32_t i = 0; i < 3 * kNotifyWindow; ++i) {
    SubmitOptions options;
    options.has_notify = true;
    options.deadline_ns = deadline_after(60);
    sent.push_back(pair.a->notify(pair.to_b, options));
  }
  finish(sent[kNotifyWindow - 1]);
  CHECK(sent[kNotifyWindow + 1]->state == State::kQueued);
  // Bulk without a message passes those that wait.
  finish(pair.move(Op::kWrite, 0, 0, 1 << 20));
  size_t got = 0;
  const int64_t deadline = deadline_after(30);
  while (got < sent.size() && now_ns() < deadline) {
    got += pair.b->notifications().size();
    std::this_thread::yield();
  }
  CHECK(got == sent.size());
  for (auto& t : sent) finish(t);
}

TEST_CASE("a small notification does not wait for a long write") {
  Pair pair(uint64_t{1} << 27);
  TransferPtr bulk = pair.move(Op::kWrite, 0, 0, int64_t{1} << 27);
  SubmitOptions options;
  options.has_notify = true;
  options.deadline_ns = deadline_after(30);
  TransferPtr note = pair.a->notify(pair.to_b, options);
  finish(note);
  CHECK(bulk->state != State::kDone);
  finish(bulk);
}

TEST_CASE("deadlines end what a lease-less owner never answers, close ends the rest") {
  Pair pair;
  SubmitOptions soon;
  soon.deadline_ns = now_ns();  // already over
  TransferPtr late = pair.move(Op::kWrite, 0, 0, 1 << 22, soon);
  REQUIRE(late->wait(deadline_after(10)) == Woken::kNotified);
  CHECK((late->state == State::kTimedOut || late->state == State::kDone));
  std::vector<TransferPtr> open;
  for (int i = 0; i < 50; ++i) open.push_back(pair.move(Op::kWrite, 0, 0, 1 << 22));
  std::thread closer([&] { pair.a->close(); });
  pair.a->close();
  closer.join();
  for (auto& t : open) {
    REQUIRE(t->wait(deadline_after(10)) == Woken::kNotified);
    CHECK((t->state == State::kCancelled || t->state == State::kDone));
    CHECK(t->quiesced);
  }
}

TEST_CASE("two engines that connect to each other at once have one peer each") {
  for (int round = 0; round < 10; ++round) {
    EngineOptions options;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {transport()};
    auto a = Engine::create(options), b = Engine::create(options);
    PeerPtr to_a, to_b;
    std::thread other([&] { to_a = b->connect(a->address(), 10); });
    to_b = a->connect(b->address(), 10);
    other.join();
    for (auto& [engine, peer] : {std::pair{a, to_b}, {b, to_a}}) {
      SubmitOptions note;
      note.has_notify = true;
      note.deadline_ns = deadline_after(20);
      finish(engine->notify(peer, note));
      CHECK(engine->stats().peers.size() == 1);
    }
    a->close();
    b->close();
  }
}

TEST_CASE("a region of several pieces is one offset space") {
  Pair pair;
  std::vector<std::byte> one(5), two(4000), three(7);
  auto region = pair.a->register_pieces(
      {{one.data(), 0, one.size()}, {two.data(), 0, two.size()}, {three.data(), 0, three.size()}},
      true, nullptr, {.name = "pieces"});
  CHECK(region->nbytes == 4012);
  for (size_t i = 0; i < 4012; ++i) *pair.at_b(i) = std::byte(i);
  const int64_t local = 3, into = 3, nbytes = 4005;
  TransferPtr t = pair.a->submit(
      Op::kRead, region, pair.remote,
      SpanArguments{{&local, 1, true}, {&into, 1, true}, {&nbytes, 1, true}, {}, false},
      {.notify = {}, .lease = {}, .deadline_ns = deadline_after(30), .after = {}});
  finish(t);
  CHECK(one[3] == std::byte{3});
  CHECK(two[0] == std::byte{5});
  CHECK(two[3999] == std::byte(4004 % 256));
  CHECK(three[2] == std::byte(4007 % 256));
  CHECK(three[3] == std::byte{0});
}

TEST_CASE("who polls brings its messages in by polling, and what it owes is told when it stops") {
  Pair pair;
  PeerPtr to_a;
  for (const int64_t end_ns = deadline_after(30); !to_a && now_ns() < end_ns;)
    for (auto& event : pair.b->peer_events()) to_a = event.peer;
  REQUIRE(to_a);
  const auto message = [] {
    SubmitOptions options;
    options.has_notify = true;
    options.notify = Bytes(64);
    options.deadline_ns = deadline_after(60);
    return options;
  };
  const auto take = [](Engine& engine) {
    for (const int64_t end_ns = deadline_after(60); now_ns() < end_ns;)
      if (const auto got = engine.notifications(); !got.empty()) return got.size();
    return size_t{0};
  };
  constexpr size_t kTrips = 2000;
  std::vector<TransferPtr> sent;
  std::thread echo([&] {
    for (size_t i = 0; i < kTrips; ++i) {
      if (take(*pair.b) != 1) return;
      pair.b->notify(to_a, message());
    }
  });
  size_t came = 0;
  for (size_t i = 0; i < kTrips; ++i) {
    sent.push_back(pair.a->notify(pair.to_b, message()));
    const size_t n = take(*pair.a);
    if (n == 0) break;
    came += n;
  }
  CHECK(came == kTrips);
  echo.join();
  // Nobody polls b any more, and a only sleeps: the last outcomes come all the same.
  for (auto& transfer : sent) finish(transfer);
  finish(pair.a->notify(pair.to_b, message()));
}

TEST_CASE("polling for a transfer's end is enough to bring it about") {
  Pair pair;
  std::memset(pair.at_a(0), 0x77, 1 << 22);
  for (int round = 0; round < 20; ++round) {
    const TransferPtr t = pair.move(round % 2 ? Op::kRead : Op::kWrite, 0, 0, 1 << 22);
    for (const int64_t end_ns = deadline_after(60); !t->terminal() && now_ns() < end_ns;)
      pair.a->poll();
    REQUIRE(t->state.load() == State::kDone);
  }
  CHECK(all_equal(pair.at_b(0), 1 << 22, 0x77));
}
