// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines over software NICs on which everything goes wrong that can: each request ends once,
// whole or with a typed error, nothing else lands, and nothing is left behind.
#include <functional>
#include <random>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"
#include "transport/verbs/connection.hpp"
#include "verbs_plan.hpp"

using namespace kvxfer;
using verbs::VerbsConnection;

namespace {

constexpr int64_t kBytes = 256 << 10;

bool eventually(const std::function<bool()>& done) { return eventually_within(30, done); }

struct World : Pair {
  World() : Pair(1 << 22, "127.0.0.1:0", impatient()) {
    if (std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr) lease = grant(0, 1 << 22);
    REQUIRE(eventually([this] {
      for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
      return to_a != nullptr;
    }));
    num_rails = ends(to_b).rails.size();
  }
  static verbs::Ends ends(const PeerPtr& peer) {
    std::lock_guard lock(peer->mutex);
    return dynamic_cast<VerbsConnection&>(*peer->links.at(0)->data.at(0)).ends();
  }
  // What posts: messages of both, READs of both.
  std::vector<uint32_t> requesters() const {
    const verbs::Ends at_a = ends(to_b), at_b = ends(to_a);
    return {at_a.rails[0].control.number, at_b.rails[0].control.number, at_a.rails[0].pull.number,
            at_b.rails[0].pull.number};
  }
  // Under a lease where writes are pushed: no others are.
  SubmitOptions options() const { return lease ? under(lease) : SubmitOptions{}; }
  TransferPtr write() { return move(Op::kWrite, 0, 0, kBytes, options()); }
  TransferPtr read() { return move(Op::kRead, kBytes, kBytes, kBytes); }
  PeerPtr to_a;
  LeasePtr lease;
  size_t num_rails = 0;
};

// Ends, in one of the ways in which a request may, and leaves its memory alone afterwards.
State settle(const TransferPtr& t) {
  REQUIRE(t->wait(deadline_after(60)) == Woken::kNotified);
  const State state = t->state.load();
  INFO(t->message);
  CHECK((state == State::kDone || state == State::kFailed || state == State::kTimedOut));
  if (state == State::kFailed) CHECK(t->failure.code != Code::kInternal);
  CHECK(eventually([&] { return t->quiesced.load(); }));
  return state;
}

// Nothing of anybody's is left on the device.
void check_empty() {
  for (const char* what : {"qps", "cqs", "regions", "windows", "locked_bytes"})
    CHECK_MESSAGE(eventually([&] { return fake_verbs_count(what) == 0; }), what);
}

// Both engines, a connection, a write and a read; what stopped it, or nothing.
std::string attempt() {
  try {
    World w;
    std::memset(w.at_a(0), 0x11, kBytes);
    const State state = settle(w.write());
    if (state == State::kDone) CHECK(all_equal(w.at_b(0), kBytes, 0x11));
    settle(w.read());
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// Another device of that name, of which there may be other things.
void make_device(const std::string& plan) {
  REQUIRE(fake_verbs_plan(plan.c_str()) == 0);
  REQUIRE(fake_verbs_remove_device("fake0") == 0);
  REQUIRE(fake_verbs_restore_device("fake0") == 0);
}

}  // namespace

TEST_CASE("verbs: an error of any kind on any queue pair ends what it carried, once") {
  std::unique_ptr<World> w;
  for (int status = IBV_WC_LOC_LEN_ERR; status <= IBV_WC_GENERAL_ERR; ++status) {
    for (size_t which = 0; which < 4; ++which) {
      // A connection outlives its READs' queue pairs, and that of its messages where there is
      // another rail. Where not, those take a connection each; every third status has to do.
      if (which < 2 && status % 3 != static_cast<int>(which)) continue;
      CAPTURE(status);
      CAPTURE(which);
      if (!w) w = std::make_unique<World>();
      std::memset(w->at_a(0), status, kBytes);
      // The seed decides whether anything has landed by then.
      const Plan plan("seed=" + std::to_string(status * 4 + static_cast<int>(which)));
      fake_verbs_fail_next(w->requesters()[which], static_cast<ibv_wc_status>(status));
      const TransferPtr write = w->write(), read = w->read();
      if (settle(write) == State::kDone) CHECK(all_equal(w->at_b(0), kBytes, status));
      settle(read);
      if (which < 2 && w->num_rails == 1) {
        CHECK(eventually([&] { return !w->to_b->alive.load() && !w->to_a->alive.load(); }));
        w.reset();
      } else {
        CHECK(w->to_b->alive.load());
        finish(w->write());
        finish(w->read());
        if (which < 2) w.reset();  // messages have moved to queue pairs of other numbers
      }
    }
  }
  w.reset();
  check_empty();
}

TEST_CASE("verbs: any call that fails leaves a reason, and nothing behind") {
  for (const char* verb : {"open_device", "query_device", "query_port", "query_gid_ex", "alloc_pd",
                           "reg_mr", "create_comp_channel", "create_cq", "create_qp", "modify_qp",
                           "req_notify_cq", "post_recv", "post_send", "alloc_mw"}) {
    int failures = 0;
    for (int n = 1; n <= 24; ++n) {
      CAPTURE(verb);
      CAPTURE(n);
      const int64_t before = fake_verbs_count("failed_calls");
      std::string why;
      {
        const Plan plan("fail=" + std::string(verb) + "@" + std::to_string(n) + ":ENOSPC");
        why = attempt();
      }
      check_empty();
      if (fake_verbs_count("failed_calls") == before) {
        CHECK(why.empty());
        break;  // it is not called so often
      }
      ++failures;
      // What could not be set up says which call it was, and why.
      if (!why.empty()) {
        CHECK_MESSAGE(why.find(std::string("ibv_") + verb) != std::string::npos, why);
        CHECK_MESSAGE(why.find("No space left on device") != std::string::npos, why);
      }
    }
    const bool pushes = std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr;
    CHECK_MESSAGE((failures > 0 || (!pushes && std::string(verb) == "alloc_mw")), verb);
  }
  CHECK(attempt().empty());
}

TEST_CASE("verbs: a device with little works, or says what is too little") {
  for (const char* plan : {"lie=0.5", "lie=0.05", "max_sge=1", "max_inline=0", "max_rd_atomic=1",
                           "max_rd_atomic=0", "mtu=256", "max_qp_wr=64", "max_qp_wr=8",
                           "max_cqe=64", "windows=0", "max_qp=5", "max_mr=1", "memlock=100000"}) {
    CAPTURE(plan);
    {
      const Plan little(plan);
      const std::string why = attempt();
      // Where it does not work, the limit or the call that failed is named.
      if (!why.empty())
        CHECK_MESSAGE(
            (why.find("ibv_") != std::string::npos || why.find("fake0:1 has") != std::string::npos),
            why);
    }
    check_empty();
  }
}

TEST_CASE("verbs: every kind of address will do, and none at all is a reason") {
  for (const char* plan : {"gids=v4r2", "gids=v6r2", "gids=ll2", "gids=v4r1", "gids=none,none,v4r2",
                           "gids=ll1,ll2,v4r1,v4r2,v6r1,v6r2", "link=ib", "ports=2 down=0"}) {
    CAPTURE(plan);
    make_device(plan);
    CHECK(attempt() == "");
  }
  make_device("gids=none");
  CHECK(attempt().find("no GID") != std::string::npos);
  make_device("down=0");
  CHECK(attempt().find("port 1 is down") != std::string::npos);
  make_device("");
  CHECK(attempt() == "");
  check_empty();
}

TEST_CASE("verbs: a link that goes ends what is under way, and one that comes back serves again") {
  {
    World w;
    fake_verbs_hold(w.requesters()[3]);
    const uint32_t held = w.requesters()[3];
    const TransferPtr write = w.write();
    REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
    const bool only = w.num_rails == 1;
    CHECK(settle(write) == (only ? State::kFailed : State::kDone));
    if (only) CHECK(eventually([&] { return !w.to_b->alive.load(); }));
    CHECK(w.to_b->alive.load() == !only);
    fake_verbs_release(held);
  }
  REQUIRE(fake_verbs_set_port("fake0", 1, 1) == 0);
  check_empty();
  CHECK(attempt() == "");
}

// Random writes and reads on slots of 64 KiB. Whenever a request has ended and is quiet its memory
// is poisoned, and what was accepted is never poison.
TEST_CASE("verbs: whatever goes wrong, what is done is right and what is quiet stays so") {
  constexpr int64_t kSlot = 64 << 10;
  constexpr int kSlots = 8;
  for (int seed = 1; seed <= 6; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(static_cast<uint32_t>(seed));
    std::unique_ptr<World> w;
    TransferPtr running[kSlots];
    Op ops[kSlots] = {};
    int values[kSlots] = {};
    bool unknown[kSlots] = {};
    const auto end = [&](int slot) {
      if (!running[slot]) return;
      const bool done = settle(running[slot]) == State::kDone;
      if (!done && ops[slot] == Op::kWrite) unknown[slot] = true;
      const std::byte* at = ops[slot] == Op::kWrite ? w->at_b(slot * kSlot) : w->at_a(slot * kSlot);
      if (done) CHECK(all_equal(at, kSlot, values[slot]));
      if (done) unknown[slot] = false;
      std::memset(w->at_a(slot * kSlot), 0xEE, kSlot);  // quiet: never seen by anybody
      running[slot] = nullptr;
    };
    std::optional<Plan> plan;
    for (int i = 0; i < 60; ++i) {
      if (!w || !w->to_b->alive.load()) {
        for (int slot = 0; slot < kSlots; ++slot) end(slot), unknown[slot] = false;
        plan.reset();
        w = std::make_unique<World>();
        plan.emplace("seed=" + std::to_string(seed * 100 + i) +
                     " error=0.002:any post=0.002 drop=0.002 lose_ack=0.002 delay=0.1:1ms "
                     "duplicate=0.1:2ms hold_cqe=0.1:1ms short_poll=0.3");
      }
      const int slot = static_cast<int>(random() % kSlots);
      end(slot);
      ops[slot] = random() % 3 || unknown[slot] ? Op::kWrite : Op::kRead;
      values[slot] = static_cast<int>(i % 200 + 1);
      // Nobody else is at this slot: its last request is over and quiet.
      std::memset(ops[slot] == Op::kWrite ? w->at_a(slot * kSlot) : w->at_b(slot * kSlot),
                  values[slot], kSlot);
      running[slot] = w->move(ops[slot], slot * kSlot, slot * kSlot, kSlot,
                              ops[slot] == Op::kWrite ? w->options() : SubmitOptions{});
      if (random() % 8 == 0) {
        w->a->cancel(running[slot]);
        CHECK(eventually([&] { return running[slot]->quiesced.load(); }));
        std::memset(w->at_a(slot * kSlot), 0xEE, kSlot);
        // A write may still be landing over there. The next one waits for it; whoever fills that
        // memory himself, for a read, cannot know.
        unknown[slot] = ops[slot] == Op::kWrite;
        running[slot] = nullptr;
      }
    }
    for (int slot = 0; slot < kSlots; ++slot) end(slot);
  }
}
