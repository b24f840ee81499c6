// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Pushed writes when things go wrong: queue pairs that fail, completions that are lost, cancels,
// deaths; each request ends once, counts once, and nothing lands late.
#include <poll.h>

#include <random>

#include "verbs_push_world.hpp"
#include "verbs_tamper.hpp"

using namespace kvxfer;

TEST_CASE("push: a network that loses, delays and repeats costs time alone") {
  PushWorld w;
  for (int64_t i = 0; i < 3 * kBytes; ++i) w.at_a(0)[i] = static_cast<std::byte>(i * 7 + i / 251);
  Plan plan("seed=5 drop=0.01 lose_ack=0.01 delay=0.2:1ms duplicate=0.1:1ms hold_cqe=0.1:1ms");
  for (int round = 0; round < 3; ++round) {
    std::memset(w.at_b(0), 0, 3 * kBytes);
    const LeasePtr lease = w.grant(0, 3 * kBytes, 1);
    finish(w.write(lease, 3 * kBytes, 0, 0));
    CHECK(std::memcmp(w.at_a(0), w.at_b(0), 3 * kBytes) == 0);
    CHECK(lease->arrived(0));
    w.revoke(lease);
  }
  CHECK(w.alive());
  CHECK(w.pushed() >= 9 * kBytes);
}

TEST_CASE("push: a queue pair that fails costs its requests nothing") {
  for (const bool at_owner : {false, true}) {
    CAPTURE(at_owner);
    PushWorld w;
    w.warm_up();
    const LeasePtr lease = w.grant(0, 12 * kBytes, 4);
    std::vector<TransferPtr> transfers;
    const uint32_t number = at_owner ? w.sink() : w.pusher();
    {
      Held held(HeldPush::sinks(w));
      for (int i = 0; i < 4; ++i)
        transfers.push_back(w.write(lease, 3 * kBytes, i * 3 * kBytes, static_cast<uint64_t>(i)));
      fake_verbs_pass(w.sink(), 300);  // some of the first one's have landed by then
      ::poll(nullptr, 0, 20);
      REQUIRE(fake_verbs_break_qp(number) == 0);
      ::poll(nullptr, 0, 20);
    }
    for (const TransferPtr& t : transfers) finish(t);
    CHECK(all_equal(w.at_b(0), 12 * kBytes, 0x11));
    CHECK(lease->num_arrived.load() == 4);
    CHECK(w.alive());
    CHECK(w.pulled() == 0);
    CHECK(w.explains("1 queue pair(s) of pushes replaced"));
    std::memset(w.at_b(0), 0xEE, 12 * kBytes);
    ::poll(nullptr, 0, 20);
    CHECK(all_equal(w.at_b(0), 12 * kBytes, 0xEE));  // nothing of the old ones comes late
  }
}

TEST_CASE("push: what was accepted is not written again when its acknowledgements are lost") {
  PushWorld w;
  w.warm_up();
  constexpr int64_t kSize = kBytes / 4;  // no more than a NIC sends without an acknowledgement
  const LeasePtr lease = w.grant(0, kBytes, 1);
  finish(w.write(lease, 4096));
  TransferPtr t;
  {
    std::vector<uint32_t> pushers;
    for (const auto& rail : w.writer()) pushers.push_back(rail.pusher);
    Held acks(pushers);
    t = w.write(lease, kSize, 0, 0);
    REQUIRE(eventually([&] { return lease->arrived(0); }));
    CHECK(all_equal(w.at_b(0), kSize, 0x11));
    CHECK(t->state.load() != State::kDone);  // our NIC may still read its source
    std::memset(w.at_b(0), 0xEE, kSize);     // it is the owner's again
    for (const uint32_t pusher : pushers) REQUIRE(fake_verbs_break_qp(pusher) == 0);
    finish(t);
  }
  ::poll(nullptr, 0, 20);
  CHECK(all_equal(w.at_b(0), kSize, 0xEE));
  CHECK(lease->num_arrived.load() == 1);
  finish(w.write(lease, kBytes));
  CHECK(w.alive());
}

TEST_CASE("push: chains that have landed are not posted again for those that have not") {
  PushWorld w;
  if (w.owner().size() > 1) return;  // it counts the packets of one queue pair
  w.warm_up();
  // Blocks that are neighbours nowhere: four chains of 64 requests, a packet each.
  constexpr int64_t kBlock = 1024, kCount = 256;
  std::vector<int64_t> offsets(kCount);
  for (int64_t i = 0; i < kCount; ++i) offsets[static_cast<size_t>(i)] = 2 * i * kBlock;
  const LeasePtr lease = w.grant(0, kBytes, 1);
  finish(w.write(lease, 1));
  const Held sink({w.sink()}), acks({w.pusher()});
  SubmitOptions options = under(lease);
  options.deadline_ns = deadline_after(30);
  options.has_arrival = true;
  const int64_t before = fake_verbs_count("doorbells"), placed = fake_verbs_count("bytes_placed");
  const TransferPtr t = w.a->submit(Op::kWrite, w.ra, w.remote,
                                    SpanArguments{{offsets.data(), kCount, false},
                                                  {offsets.data(), kCount, false},
                                                  {&kBlock, 1, true},
                                                  {},
                                                  false},
                                    options);
  REQUIRE(eventually([&] { return fake_verbs_count("doorbells") >= before + 5; }));
  // The first chain lands, and a part of the second; their acknowledgements are not heard.
  fake_verbs_pass(w.sink(), 100);
  REQUIRE(eventually([&] { return fake_verbs_count("bytes_placed") - placed >= 100 * kBlock; }));
  ::poll(nullptr, 0, 20);
  REQUIRE(fake_verbs_break_qp(w.pusher()) == 0);
  finish(t);
  bool same = true;
  for (int64_t i = 0; i < kCount; ++i)
    same &= all_equal(w.at_b(static_cast<size_t>(2 * i * kBlock)), kBlock, 0x11);
  CHECK(same);
  CHECK(lease->num_arrived.load() == 1);
  // Of the first two chains 100 packets or all; then what is missing, 192 or 128, and some
  // messages. With the first chain again it were 64 more, 356 or 320.
  const int64_t total = fake_verbs_count("bytes_placed") - placed;
  CHECK(total >= kCount * kBlock);
  CHECK(total < 310 * kBlock);
}

TEST_CASE("push: a cancelled write is quiet at its completions, or when its queue pair is gone") {
  PushWorld w;
  w.warm_up();
  const LeasePtr lease = w.grant(0, 4 * kBytes, 2);
  finish(w.write(lease, 4096));
  SUBCASE("its completions come") {
    HeldPush push(w, lease, 3 * kBytes);
    w.a->cancel(push.transfer);
    CHECK(push.transfer->state.load() == State::kCancelled);
    CHECK_FALSE(push.transfer->agreed);
    CHECK_FALSE(push.transfer->quiesced.load());
    push.held.release();
    REQUIRE(quiesces(push.transfer));
  }
  SUBCASE("they do not") {
    HeldPush push(w, lease, 3 * kBytes);
    w.a->cancel(push.transfer);
    REQUIRE(quiesces(push.transfer));
    // Held packets of the first are not to overtake the second, which waits for the owner's word.
    std::memset(w.at_a(0), 0x66, 3 * kBytes);  // poison
    std::memset(w.at_a(0), 0x22, 3 * kBytes);
    const TransferPtr again = w.write(lease, 3 * kBytes, 0, 1);
    push.held.release();
    finish(again);
    CHECK(all_equal(w.at_b(0), 3 * kBytes, 0x22));
  }
  std::memset(w.at_a(0), 0x33, 3 * kBytes);
  finish(w.write(lease, 3 * kBytes, 0, 1));
  CHECK(all_equal(w.at_b(0), 3 * kBytes, 0x33));
  CHECK_FALSE(lease->arrived(0));
  CHECK(w.alive());
}

TEST_CASE("push: a write that is cancelled while it waits for its window never was") {
  PushWorld w;
  const LeasePtr lease = w.grant(0, kBytes, 1);
  Held deaf({w.control_of_b()});
  const TransferPtr t = w.write(lease, kBytes, 0, 0);
  w.a->cancel(t);
  CHECK(t->state.load() == State::kCancelled);
  CHECK(t->agreed);
  CHECK(t->quiesced.load());
  deaf.release();
  finish(w.write(lease, kBytes, 0, 0));
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
}

TEST_CASE("push: the death of either side ends everything, and leaves nothing behind") {
  for (const int who : {0, 1, 2, 3}) {
    CAPTURE(who);
    {
      PushWorld w;
      // Of several rails the others go on (test_verbs_control.cpp).
      if (who >= 2 && w.writer().size() > 1) continue;
      w.warm_up();
      const LeasePtr lease = w.grant(0, 4 * kBytes, 1);
      finish(w.write(lease, 4096));
      HeldPush push(w, lease, 3 * kBytes);
      if (who == 0) w.a->close();
      if (who == 1) w.b->close();
      if (who == 2) REQUIRE(fake_verbs_break_qp(w.control_of_a()) == 0);
      if (who == 3) REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
      REQUIRE(push.transfer->wait(deadline_after(30)) == Woken::kNotified);
      CHECK(push.transfer->state.load() != State::kDone);
      CHECK(quiesces(push.transfer));
      w.b->begin_revoke(lease);
      CHECK(eventually([&] { return lease->gate.quiet(); }));
      std::memset(w.at_b(0), 0xEE, 3 * kBytes);
      push.held.release();
      ::poll(nullptr, 0, 20);
      CHECK(all_equal(w.at_b(0), 3 * kBytes, 0xEE));
      REQUIRE(fake_verbs_set_port("fake0", 1, 1) == 0);
    }
    for (const char* what : {"qps", "cqs", "regions", "windows", "locked_bytes"})
      CHECK_MESSAGE(eventually([&] { return fake_verbs_count(what) == 0; }), what);
  }
}

TEST_CASE("push: where it fails again and again it is given up, and writes are pulled") {
  PushWorld w;
  w.warm_up();
  const LeasePtr lease = w.grant(0, 4 * kBytes);
  const auto given_up = [&] {
    return w.explained().find("no rail is left for pushed writes") != std::string::npos;
  };
  // Every fresh queue pair waits for packets that were never sent, and has none of those that come.
  const tamper::Tamper tamper(verbs::Type::kNewPusher, [](const tamper::Message& message) {
    tamper::Message out = message;
    verbs::QpHead head;
    std::memcpy(&head, out.body.data(), sizeof head);
    head.psn = (head.psn - 4096) & 0xffffff;
    std::memcpy(out.body.data(), &head, sizeof head);
    return std::vector{out};
  });
  for (size_t rail = 0; rail < w.writer().size(); ++rail)
    fake_verbs_fail_next(w.pusher(rail), IBV_WC_RETRY_EXC_ERR);
  const int64_t until = deadline_after(60);
  while (!given_up() && now_ns() < until) {
    const TransferPtr t = w.write(lease, 4096);
    REQUIRE(t->wait(deadline_after(30)) == Woken::kNotified);
    INFO(t->message);
    CHECK((t->state.load() == State::kDone || t->failure.code == Code::kTransport));
  }
  REQUIRE(given_up());
  CHECK(w.alive());
  const uint64_t pulled = w.pulled();
  std::memset(w.at_a(0), 0x77, kBytes);
  finish(w.write(lease));
  CHECK(all_equal(w.at_b(0), kBytes, 0x77));
  CHECK(w.pulled() == pulled + kBytes);
}

// Random leases, writes, cancels and revocations on slots of 64 KiB: what is accepted is right, and
// once a lease is quiet nothing lands any more.
TEST_CASE("push: whatever goes wrong, what is done is right and what is quiet stays so") {
  constexpr int64_t kSlot = 64 << 10;
  constexpr int kSlots = 8;
  for (int seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(static_cast<uint32_t>(seed));
    std::unique_ptr<PushWorld> w;
    LeasePtr leases[kSlots];
    TransferPtr running[kSlots];
    int values[kSlots] = {};
    const auto settle = [&](int slot) {
      const TransferPtr t = std::exchange(running[slot], nullptr);
      if (!t) return;
      REQUIRE(t->wait(deadline_after(60)) == Woken::kNotified);
      INFO(t->message);
      const State state = t->state.load();
      CHECK((state == State::kDone || state == State::kFailed || state == State::kTimedOut ||
             state == State::kCancelled));
      if (state == State::kFailed) CHECK(t->failure.code != Code::kInternal);
      REQUIRE(quiesces(t));
      std::memset(w->at_a(static_cast<size_t>(slot * kSlot)), 0xEE, kSlot);
      if (state == State::kDone)
        CHECK(all_equal(w->at_b(static_cast<size_t>(slot * kSlot)), kSlot, values[slot]));
    };
    // Quiet, then filled by its owner, then looked at when all is over.
    const auto end_lease = [&](int slot) {
      if (!leases[slot]) return;
      w->revoke(leases[slot]);
      std::memset(w->at_b(static_cast<size_t>(slot * kSlot)), 0xDD, kSlot);
      settle(slot);
      CHECK(all_equal(w->at_b(static_cast<size_t>(slot * kSlot)), kSlot, 0xDD));
      leases[slot] = nullptr;
    };
    std::optional<Plan> plan;
    for (int i = 0; i < 80; ++i) {
      if (!w || !w->alive()) {
        for (int slot = 0; slot < kSlots; ++slot) {
          if (w) settle(slot);
          leases[slot] = nullptr;
        }
        plan.reset();
        w = std::make_unique<PushWorld>(kSlots * kSlot);
        plan.emplace("seed=" + std::to_string(seed * 100 + i) +
                     " error=0.003:any post=0.002 bind=0.02 invalidate=0.05 drop=0.002 "
                     "lose_ack=0.002 delay=0.1:1ms duplicate=0.1:2ms hold_cqe=0.1:1ms "
                     "short_poll=0.3");
      }
      const int slot = static_cast<int>(random() % kSlots);
      if (leases[slot] && random() % 4 == 0) {
        // With its write under way: it is done, or has not touched what came after.
        if (running[slot] && random() % 2) settle(slot);
        const bool under_way = running[slot] != nullptr;
        w->revoke(leases[slot]);
        std::memset(w->at_b(static_cast<size_t>(slot * kSlot)), 0xDD, kSlot);
        if (under_way) {
          const TransferPtr t = std::exchange(running[slot], nullptr);
          REQUIRE(t->wait(deadline_after(60)) == Woken::kNotified);
          REQUIRE(quiesces(t));
        }
        CHECK(all_equal(w->at_b(static_cast<size_t>(slot * kSlot)), kSlot, 0xDD));
        leases[slot] = nullptr;
      }
      settle(slot);
      if (!leases[slot]) leases[slot] = w->grant(slot * kSlot, kSlot);
      values[slot] = i % 200 + 1;
      std::memset(w->at_a(static_cast<size_t>(slot * kSlot)), values[slot], kSlot);
      running[slot] = w->write(leases[slot], kSlot, slot * kSlot);
      if (random() % 8 == 0) w->a->cancel(running[slot]);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      settle(slot);
      if (w->alive()) end_lease(slot);
    }
  }
}
