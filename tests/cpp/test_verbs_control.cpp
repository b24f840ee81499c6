// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Messages of a connection move to another rail: whatever was under way goes on, each message is
// acted on once and in order, and what is quiet stays so. Run with KVXFER_FAKE_VERBS=devices=2.
#include <poll.h>

#include <functional>
#include <random>
#include <string>

#include "verbs_rails_world.hpp"

using namespace rails;

namespace {

enum class Loss : uint8_t { kPort, kOurs, kTheirs, kBoth };
constexpr Loss kLosses[] = {Loss::kPort, Loss::kOurs, Loss::kTheirs, Loss::kBoth};

size_t carrier(const std::vector<VerbsConnection::Carried>& rails) {
  for (size_t i = 0; i < rails.size(); ++i)
    if (rails[i].carries_messages) return i;
  return rails.size();
}

struct Moving : World {
  explicit Moving(const TransportConfig& config = impatient()) : World(config) {}

  // `a` has asked for the connection: its side is reads(), b's is writes().
  bool over(size_t rail) const { return carrier(reads()) == rail && carrier(writes()) == rail; }
  // Either side could carry messages on, if they had to move there.
  bool stands_by(size_t rail) const {
    return in_use(rail) && reads()[rail].control != 0 && writes()[rail].control != 0;
  }
  // What carries messages is of no use any more; the port of both sides, or a queue pair.
  void lose(Loss how, size_t rail) const {
    const uint32_t ours = reads()[rail].control, theirs = writes()[rail].control;
    if (how == Loss::kPort) REQUIRE(fake_verbs_set_port(device(rail), 1, 0) == 0);
    if (how == Loss::kOurs || how == Loss::kBoth) REQUIRE(fake_verbs_break_qp(ours) == 0);
    if (how == Loss::kTheirs || how == Loss::kBoth) (void)fake_verbs_break_qp(theirs);
  }
  static const char* device(size_t rail) { return rail == 0 ? "fake0" : "fake1"; }
  // It has moved away from there, and that rail could be moved back to.
  void check_moved(Loss how, size_t from) const {
    CHECK(eventually([&] { return over(1 - from); }));
    CHECK(alive());
    if (how == Loss::kPort) REQUIRE(fake_verbs_set_port(device(from), 1, 1) == 0);
    CHECK(eventually([&] { return stands_by(from); }));
  }

  // Notifications from a to b, each with its number.
  TransferPtr notify() {
    SubmitOptions options;
    options.deadline_ns = deadline_after(30);
    options.has_notify = true;
    options.notify.resize(sizeof num_sent);
    std::memcpy(options.notify.data(), &num_sent, sizeof num_sent);
    ++num_sent;
    return a->notify(to_b, std::move(options));
  }
  // Takes what has come: each once, in the order in which they were sent.
  void take() {
    for (const Notification& each : b->notifications()) {
      uint32_t number = 0;
      REQUIRE(each.payload.size() == sizeof number);
      std::memcpy(&number, each.payload.data(), sizeof number);
      CHECK(number == num_taken);
      ++num_taken;
    }
  }
  void check_all_came() {
    CHECK(eventually([&] {
      take();
      return num_taken >= num_sent;
    }));
    ::poll(nullptr, 0, 5);  // for one that comes twice
    take();
    CHECK(num_taken == num_sent);
  }
  uint32_t num_sent = 0, num_taken = 0;
};

}  // namespace

TEST_CASE("control: writes and reads under way go on when their messages have to move") {
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    {
      HeldWrite held(w, kBytes, {});
      w.lose(how, 0);
      CHECK(eventually([&] { return w.over(1); }));
      CHECK(held.transfer->state.load() == State::kPosted);
      held.release();
      finish(held.transfer);
    }
    CHECK(w.same());
    w.check_moved(how, 0);
    CHECK(w.a->explain(*w.to_b).find("messages over rail 1, moved 1 time(s)") != std::string::npos);
    // And back, with a read.
    const auto rails = w.reads();
    for (const auto& rail : rails) fake_verbs_hold(rail.puller);
    const int64_t before = fake_verbs_count("work_requests");
    const TransferPtr read = w.read();
    REQUIRE(eventually([&] { return fake_verbs_count("work_requests") >= before + 4; }));
    w.lose(how, 1);
    CHECK(eventually([&] { return w.over(0); }));
    for (const auto& rail : rails) fake_verbs_release(rail.puller);
    finish(read);
    CHECK(std::memcmp(w.at_a(kBytes), w.at_b(0), kBytes) == 0);
    w.check_moved(how, 1);
  }
  check_empty();
}

TEST_CASE("control: notifications come once and in order, however often messages move") {
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    std::vector<TransferPtr> sent;
    for (int round = 0; round < 6; ++round) {
      const size_t from = carrier(w.reads());
      for (int i = 0; i < 40; ++i) {
        sent.push_back(w.notify());
        if (i == 20 + round) w.lose(how, from);
        w.take();
      }
      w.check_moved(how, from);
    }
    for (const TransferPtr& each : sent) finish(each);
    w.check_all_came();
  }
}

// The queue pair ends with an error before the message went out, or after it has landed and been
// acted on: by the seed, half of the time each.
TEST_CASE("control: a message whose acknowledgement is lost is not acted on twice") {
  int failed[2] = {};
  for (int seed = 1; seed <= 16; ++seed) {
    CAPTURE(seed);
    Moving w;
    const Plan plan("seed=" + std::to_string(seed));
    const bool ours = seed % 2 == 0;
    const auto& side = ours ? w.reads() : w.writes();
    fake_verbs_fail_next(side[0].control, IBV_WC_RETRY_EXC_ERR);
    std::vector<TransferPtr> sent;
    for (int i = 0; i < 20; ++i) sent.push_back(w.notify());
    for (const TransferPtr& each : sent) finish(each);
    w.check_all_came();
    finish(w.write());
    CHECK(w.same());
    CHECK(eventually([&] { return w.over(1); }));
    CHECK(w.alive());
    ++failed[ours];
  }
  CHECK(failed[0] == failed[1]);
}

TEST_CASE("control: a post that fails moves messages and loses none") {
  for (const char* verb : {"post_send", "post_recv"}) {
    for (int n = 1; n <= 9; n += 2) {
      CAPTURE(verb);
      CAPTURE(n);
      Moving w;
      {
        // Of either side: nothing but messages is posted meanwhile.
        const Plan plan("fail=" + std::string(verb) + "@" + std::to_string(n) + ":EIO");
        std::vector<TransferPtr> sent;
        for (int i = 0; i < 20; ++i) sent.push_back(w.notify());
        for (const TransferPtr& each : sent) finish(each);
        w.check_all_came();
      }
      CHECK(eventually([&] { return w.over(1); }));
      CHECK(w.alive());
      finish(w.write());
      CHECK(w.same());
    }
  }
}

TEST_CASE("control: bytes that go in messages are whole and in order") {
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    const RegionPtr hidden = w.a->allocate(2 * kBytes, {.name = "hidden", .shareable = false});
    std::memcpy(hidden->pieces[0].base, w.at_a(0), kBytes);
    const int64_t zero = 0, there = kBytes;
    const auto move = [&](Op op, const int64_t& local) {
      SubmitOptions options;
      options.deadline_ns = deadline_after(60);
      return w.a->submit(
          op, hidden, w.remote,
          SpanArguments{{&local, 1, true}, {&zero, 1, true}, {&kBytes, 1, true}, {}, false},
          options);
    };
    for (int round = 0; round < 4; ++round) {
      const size_t from = carrier(w.reads());
      std::memset(w.at_b(0), 0, kBytes);
      const TransferPtr write = move(Op::kWrite, zero);
      // Somewhere in the middle of them.
      const int64_t posted = fake_verbs_count("work_requests");
      REQUIRE(eventually([&] {
        return fake_verbs_count("work_requests") >= posted + 300 + 50 * round ||
               write->state.load() == State::kDone;
      }));
      w.lose(how, from);
      finish(write);
      CHECK(w.same());
      w.check_moved(how, from);
    }
    finish(move(Op::kRead, there));
    CHECK(std::memcmp(hidden->pieces[0].base + kBytes, w.at_b(0), kBytes) == 0);
  }
}

TEST_CASE("control: a revocation holds while messages move") {
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    const LeasePtr lease = w.grant(0, kBytes, 1);
    HeldWrite held(w, 4 * kMiB, under(lease));
    w.lose(how, 0);
    w.b->begin_revoke(lease);
    REQUIRE(eventually([&] { return lease->gate.quiet(); }));
    std::memset(w.at_b(0), 0xEE, kBytes);
    held.release();
    finish(held.transfer, State::kFailed);
    CHECK(held.transfer->failure.code == Code::kLease);
    ::poll(nullptr, 0, 20);
    CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
    w.check_moved(how, 0);
    finish(w.write());
    CHECK(w.same());
  }
}

TEST_CASE("control: an abort is acted on before anything that follows it") {
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    const LeasePtr lease = w.grant(0, kBytes, 2);
    HeldWrite held(w, 4 * kMiB, arriving(lease, 0));
    // The owner hears nothing, so the abort is among what is sent again.
    const uint32_t deaf = w.writes()[0].control;
    fake_verbs_hold(deaf);
    w.a->cancel(held.transfer);
    w.lose(how, 0);
    check_retry_alone_is_accepted(w, lease, held.transfer, [&] {
      fake_verbs_release(deaf);
      held.release();
    });
    w.check_moved(how, 0);
  }
}

TEST_CASE("control: pushed writes and their windows go on") {
  TransportConfig config = impatient();
  config.verbs_push = true;
  for (const Loss how : kLosses) {
    CAPTURE(static_cast<int>(how));
    Moving w(config);
    for (int round = 0; round < 4; ++round) {
      CAPTURE(round);
      const size_t from = carrier(w.reads());
      const LeasePtr lease = w.grant(0, kBytes, 2);
      const TransferPtr before = w.write(kBytes, arriving(lease, 0));
      if (round % 2) finish(before);
      w.lose(how, from);
      const TransferPtr after = w.write(kBytes, arriving(lease, 1));
      finish(before);
      finish(after);
      CHECK(w.same());
      CHECK(lease->arrived(0));
      CHECK(lease->arrived(1));
      w.b->begin_revoke(lease);
      REQUIRE(eventually([&] { return lease->gate.quiet(); }));
      std::memset(w.at_b(0), 0xEE, kBytes);
      ::poll(nullptr, 0, 20);
      CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
      w.check_moved(how, from);
    }
    uint64_t pushed = 0;
    for (const auto& rail : w.reads()) pushed += rail.nbytes_pushed;
    CHECK(pushed > 0);
  }
  check_empty();
}

TEST_CASE("control: a switch that fails without a word is noticed by what is not answered") {
  Moving w;
  REQUIRE(fake_verbs_cut_port("fake0", 1, 1) == 0);
  finish(w.write());
  finish(w.read());
  CHECK(w.same());
  CHECK(eventually([&] { return w.over(1); }));
  CHECK(w.alive());
  REQUIRE(fake_verbs_cut_port("fake0", 1, 0) == 0);
  CHECK(eventually([&] { return w.stands_by(0); }));
  REQUIRE(fake_verbs_cut_port("fake1", 1, 1) == 0);
  finish(w.write());
  CHECK(eventually([&] { return w.over(0); }));
  CHECK(w.alive());
}

TEST_CASE("control: one that stands by is replaced when it fails, and then serves") {
  for (const Loss how : {Loss::kOurs, Loss::kTheirs, Loss::kBoth}) {
    CAPTURE(static_cast<int>(how));
    Moving w;
    const uint32_t before = w.reads()[1].control;
    w.lose(how, 1);
    REQUIRE(eventually([&] { return w.reads()[1].control != before && w.stands_by(1); }));
    CHECK(w.over(0));
    w.lose(Loss::kPort, 0);
    finish(w.write());
    CHECK(w.same());
    w.check_moved(Loss::kPort, 0);
  }
}

TEST_CASE("control: when no other rail can carry messages, the connection ends with the reason") {
  {
    Moving w;
    HeldWrite held(w, kBytes, {});
    REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
    REQUIRE(eventually([&] { return !w.in_use(1); }));
    CHECK(w.over(0));
    w.lose(Loss::kOurs, 0);
    finish(held.transfer, State::kFailed);
    CHECK_MESSAGE(
        held.transfer->failure.text.find("the control queue pair on fake0:1") != std::string::npos,
        held.transfer->failure.text);
    CHECK(held.transfer->failure.text.find("no other rail") != std::string::npos);
    CHECK(quiesces(held.transfer));
    CHECK(eventually([&] { return !w.alive(); }));
  }
  {
    Moving w;
    HeldWrite held(w, kBytes, {});
    for (const char* device : {"fake0", "fake1"}) REQUIRE(fake_verbs_cut_port(device, 1, 1) == 0);
    w.a->cancel(w.write(4096));  // something has to be sent for it to be noticed
    CHECK(eventually([&] { return !w.alive(); }));
    finish(held.transfer, State::kFailed);
    CHECK(held.transfer->failure.code == Code::kPeerDisconnected);
    CHECK(quiesces(held.transfer));
  }
  check_empty();
}

// Whatever carries messages is lost again and again, on a network that delays, repeats and
// reorders.
TEST_CASE("control: rails that flap harm nobody") {
  for (int seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(static_cast<uint32_t>(seed));
    Moving w;
    REQUIRE(fake_verbs_plan(("seed=" + std::to_string(seed) +
                             " delay=0.05:1ms duplicate=0.05:1ms hold_cqe=0.05:1ms short_poll=0.3")
                                .c_str()) == 0);
    std::vector<TransferPtr> notes;
    for (int i = 0; i < 30; ++i) {
      CAPTURE(i);
      const size_t from = carrier(w.reads());
      const Loss how = kLosses[random() % 4];
      const int value = i + 1;
      std::memset(w.at_a(0), value, 3 * kMiB);
      notes.push_back(w.notify());
      const TransferPtr write = w.write(3 * kMiB);
      const bool cancels = random() % 4 == 0;
      for (int n = static_cast<int>(random() % 4); n > 0; --n) notes.push_back(w.notify());
      w.lose(how, from);
      notes.push_back(w.notify());
      if (cancels) {
        w.a->cancel(write);
        REQUIRE(quiesces(write));
        std::memset(w.at_a(0), 0xEE, 3 * kMiB);  // quiet: never seen by anybody
      } else {
        finish(write);
        REQUIRE(all_equal(w.at_b(0), 3 * kMiB, value));
        finish(w.read(3 * kMiB));
        REQUIRE(all_equal(w.at_a(kBytes), 3 * kMiB, value));
      }
      w.take();
      w.check_moved(how, from);
    }
    for (const TransferPtr& each : notes) finish(each);
    w.check_all_came();
    CHECK(w.alive());
  }
  check_empty();
}
