// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs that never give back what was posted, and completion queues that lose it: nothing
// waits for them for ever, and memory is called quiet only when they are gone.
#include <poll.h>

#include <string>

#include "verbs_push_world.hpp"

using namespace kvxfer;

namespace {

// In ERR nothing is completed: whoever stops a queue pair waits in vain.
constexpr const char* kNoFlush = "flush=0";

// A write that the owner has begun to pull on some rail, and of which no byte has come.
struct HeldPull {
  Held held;
  TransferPtr transfer;

  HeldPull(PushWorld& w, SubmitOptions options) : held(pullers(w)) {
    transfer = w.move(Op::kWrite, 0, 0, kBytes, std::move(options));
    REQUIRE(eventually([&] {
      int num = 0;
      for (const uint32_t number : held.numbers) num += fake_verbs_num_held(number);
      return num > 0;
    }));
  }
  static std::vector<uint32_t> pullers(const PushWorld& w) {
    std::vector<uint32_t> out;
    for (const auto& rail : w.owner()) out.push_back(rail.puller);
    return out;
  }
};

}  // namespace

TEST_CASE("stuck: a lease is quiet when the queue pair that pulled for it is gone") {
  PushWorld w(1 << 24, impatient());
  const LeasePtr lease = w.grant(0, kBytes);
  HeldPull pull(w, under(lease));
  const Plan plan(kNoFlush);
  w.b->begin_revoke(lease);
  REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  std::memset(w.at_b(0), 0xEE, kBytes);  // reused at once
  pull.held.release();
  finish(pull.transfer, State::kFailed);
  CHECK(pull.transfer->failure.code == Code::kLease);
  ::poll(nullptr, 0, 20);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  CHECK(w.alive());
  finish(w.move(Op::kWrite, 0, 0, kBytes));  // on fresh ones
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
}

TEST_CASE("stuck: a cancelled push is quiet when the queue pair that wrote is gone") {
  PushWorld w;
  w.warm_up();
  const LeasePtr lease = w.grant(0, 4 * kBytes, 2);
  finish(w.write(lease, 4096));
  HeldPush push(w, lease, 3 * kBytes);
  const Plan plan(kNoFlush);
  w.a->cancel(push.transfer);
  REQUIRE(quiesces(push.transfer));
  std::memset(w.at_a(0), 0x66, 3 * kBytes);  // poison
  push.held.release();
  std::memset(w.at_a(0), 0x22, 3 * kBytes);
  finish(w.write(lease, 3 * kBytes, 0, 1));
  CHECK(all_equal(w.at_b(0), 3 * kBytes, 0x22));
  CHECK_FALSE(lease->arrived(0));
  CHECK(w.alive());
  // Its windows were bound to a sink that did not flush either.
  w.revoke(lease);
}

TEST_CASE("stuck: messages move from a queue pair that does not flush, or the connection ends") {
  PushWorld w;
  const bool only = w.owner().size() == 1;
  HeldPull pull(w, {});
  const Plan plan(kNoFlush);
  REQUIRE(fake_verbs_break_qp(w.control_of_a()) == 0);
  if (!only) {
    for (int i = 0; i < 20; ++i) {
      SubmitOptions options;
      options.deadline_ns = deadline_after(30);
      options.has_notify = true;
      options.notify.assign(1, static_cast<std::byte>(i));
      finish(w.a->notify(w.to_b, std::move(options)));
    }
    int next = 0;
    CHECK(eventually([&] {
      for (const Notification& each : w.b->notifications())
        CHECK(each.payload == Bytes(1, static_cast<std::byte>(next++)));
      return next == 20;
    }));
  }
  pull.held.release();
  finish(pull.transfer, only ? State::kFailed : State::kDone);
  CHECK(eventually([&] { return w.alive() == !only; }));
  CHECK(quiesces(pull.transfer));
}

TEST_CASE("stuck: engines close over queue pairs that do not flush, and nothing is left") {
  {
    const Plan plan(kNoFlush);
    PushWorld w;
    w.warm_up();
    const HeldPull pull(w, {});
    const LeasePtr lease = w.grant(0, 4 * kBytes, 1);
    const HeldPush push(w, lease, kBytes);
    w.a->close();
    w.b->close();
    for (const TransferPtr& t : {pull.transfer, push.transfer}) {
      CHECK(t->state.load() == State::kCancelled);
      CHECK(t->quiesced.load());
    }
  }
  for (const char* what : {"qps", "cqs", "regions", "windows", "locked_bytes"})
    CHECK_MESSAGE(eventually([&] { return fake_verbs_count(what) == 0; }), std::string(what));
}

TEST_CASE("stuck: a completion queue that overruns is the end of its device, and says so") {
  // Hardware breaks the queue pairs as well; of Soft-RoCE there is nothing but the event.
  for (const char* kind : {"soft_roce=0", "soft_roce=1"}) {
    CAPTURE(kind);
    const Plan plan(kind);
    PushWorld w(1 << 24, impatient());
    std::memset(w.at_b(0), 0x44, kBytes);
    const bool only = w.writer().size() == 1;
    REQUIRE(fake_verbs_overrun_cq(w.writer()[0].puller) == 0);
    const TransferPtr t = w.move(Op::kRead, 0, 0, kBytes);
    finish(t, only ? State::kFailed : State::kDone);
    CHECK(quiesces(t));
    CHECK(eventually([&] { return w.alive() == !only; }));
    if (only) {
      CHECK_MESSAGE(t->message.find("fake0:1 reported: ") != std::string::npos, t->message);
      std::string why;
      CHECK(eventually([&] {
        try {
          (void)w.a->connect(w.b->address(), 10);
        } catch (const Error& error) {
          why = error.what();
        }
        return why.find("fake0:1 is of no use any more: the device has failed") !=
               std::string::npos;
      }));
      INFO(why);
    } else {
      CHECK(all_equal(w.at_a(0), kBytes, 0x44));
      // For this engine it stays away.
      CHECK(eventually([&] { return !w.writer()[0].in_use && !w.owner()[0].in_use; }));
      const uint64_t before = w.writer()[1].nbytes;
      finish(w.move(Op::kRead, 0, 0, kBytes));
      CHECK(w.writer()[1].nbytes == before + kBytes);
    }
  }
}
