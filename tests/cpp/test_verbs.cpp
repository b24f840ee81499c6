// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines over the software NICs of tests/fake_verbs, whose packets the test holds in its hand:
// what the fence, cancels and broken queue pairs promise.
#include <functional>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"
#include "transport/verbs/connection.hpp"
#include "verbs_plan.hpp"

using namespace kvxfer;
using verbs::VerbsConnection;

namespace {

constexpr int64_t kBytes = 1 << 20;

bool eventually(const std::function<bool()>& done) { return eventually_within(20, done); }

struct World : Pair {
  explicit World(uint64_t nbytes = 1 << 22) : Pair(nbytes, "127.0.0.1:0", impatient()) {
    std::memset(at_a(0), 0x11, kBytes);
    std::memset(at_b(0), 0, kBytes);
    REQUIRE(eventually([this] {
      for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
      return to_a != nullptr;
    }));
  }
  PeerPtr to_a;
  static verbs::Ends ends(const PeerPtr& peer) {
    std::lock_guard lock(peer->mutex);
    return dynamic_cast<VerbsConnection&>(*peer->links.at(0)->data.at(0)).ends();
  }
  std::string explained() const { return a->explain(*to_b); }
  bool alive() const { return to_b->alive.load(); }
  // What answers b's READs of a's memory: its packets are the bytes of a's writes.
  uint32_t puller_of_b() const { return peer_ends().rails[0].pull.number; }
  uint32_t puller_of_a() const { return ends(to_b).rails[0].pull.number; }
  uint32_t source_of_a() const { return ends(to_b).rails[0].source.number; }
  uint32_t control_of_b() const { return peer_ends().rails[0].control.number; }

 private:
  verbs::Ends peer_ends() const { return ends(to_a); }
};

// A write of a's that b has begun to pull, and whose bytes are held back.
struct HeldWrite {
  World& world;
  const uint32_t puller;
  TransferPtr transfer;

  HeldWrite(World& w, uint32_t number, SubmitOptions options = {}) : world(w), puller(number) {
    fake_verbs_hold(puller);
    const int64_t before = fake_verbs_count("work_requests");
    const int64_t doorbells = fake_verbs_count("doorbells");
    transfer = world.move(Op::kWrite, 0, 0, kBytes, std::move(options));
    // The request itself, and b's chain.
    REQUIRE(eventually([&] {
      return fake_verbs_count("work_requests") >= before + 2 &&
             fake_verbs_count("doorbells") >= doorbells + 2;
    }));
  }
  ~HeldWrite() { fake_verbs_release(puller); }
};

bool quiesces(const TransferPtr& t) {
  return eventually([&] { return t->quiesced.load(); });
}

}  // namespace

TEST_CASE("verbs: a write that is under way when its lease is revoked does not land") {
  World w;
  const LeasePtr lease = w.grant(0, kBytes, 1);
  HeldWrite held(w, w.puller_of_b(), under(lease));
  w.b->begin_revoke(lease);
  // The NIC may still store: it is not called quiet before that is over.
  CHECK_FALSE(lease->gate.quiet());
  REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  std::memset(w.at_b(0), 0xEE, kBytes);  // reused at once
  fake_verbs_release(held.puller);
  finish(held.transfer, State::kFailed);
  CHECK(held.transfer->failure.code == Code::kLease);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  CHECK(w.alive());
  finish(w.move(Op::kWrite, 0, 0, kBytes));  // on fresh queue pairs
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
  CHECK(w.explained().find("1 queue pair(s) replaced") != std::string::npos);
}

TEST_CASE("verbs: a source is taken back from an owner that does not answer") {
  World w;
  const LeasePtr lease = w.grant(0, kBytes, 2);
  SubmitOptions options = under(lease);
  options.has_arrival = true;
  options.arrival = 0;
  HeldWrite held(w, w.puller_of_b(), std::move(options));
  w.a->cancel(held.transfer);
  CHECK(held.transfer->state.load() == State::kCancelled);
  CHECK_FALSE(held.transfer->agreed);
  REQUIRE(quiesces(held.transfer));
  std::memset(w.at_a(0), 0x66, kBytes);  // poison: never to be accepted for the cancelled write
  fake_verbs_release(held.puller);
  std::memset(w.at_a(0), 0x22, kBytes);
  SubmitOptions again = under(lease);
  again.has_arrival = true;
  again.arrival = 1;
  finish(w.move(Op::kWrite, 0, 0, kBytes, std::move(again)));
  CHECK(all_equal(w.at_b(0), kBytes, 0x22));
  CHECK_FALSE(lease->arrived(0));
  CHECK(lease->arrived(1));
}

TEST_CASE("verbs: a cancel whose owner is deaf ends at once, and later all is well") {
  World w;
  const uint32_t control = w.control_of_b();
  fake_verbs_hold(control);
  const TransferPtr t = w.move(Op::kWrite, 0, 0, kBytes);
  w.a->cancel(t);
  CHECK(t->state.load() == State::kCancelled);
  REQUIRE(quiesces(t));
  std::memset(w.at_a(0), 0x33, kBytes);
  fake_verbs_release(control);
  finish(w.move(Op::kWrite, 0, 0, kBytes));
  CHECK(all_equal(w.at_b(0), kBytes, 0x33));
  CHECK(w.alive());
}

TEST_CASE("verbs: a read whose lease is revoked under way fails, and revoking waits for nobody") {
  World w;
  std::memset(w.at_b(0), 0x44, kBytes);
  const LeasePtr lease = w.grant(0, kBytes);
  const uint32_t puller = w.puller_of_a();
  fake_verbs_hold(puller);
  const int64_t before = fake_verbs_count("work_requests");
  const TransferPtr t = w.move(Op::kRead, 0, 0, kBytes, under(lease));
  // The request, the grant, the chain.
  REQUIRE(eventually([&] { return fake_verbs_count("work_requests") >= before + 3; }));
  w.b->begin_revoke(lease);
  CHECK(lease->gate.quiet());
  std::memset(w.at_b(0), 0x55, kBytes);
  fake_verbs_release(puller);
  finish(t, State::kFailed);
  CHECK(t->failure.code == Code::kLease);
}

TEST_CASE("verbs: a region that leaves fails reads of it and breaks nothing") {
  World w;
  const uint32_t puller = w.puller_of_a();
  fake_verbs_hold(puller);
  const int64_t before = fake_verbs_count("work_requests");
  const TransferPtr t = w.move(Op::kRead, 0, 0, kBytes);
  REQUIRE(eventually([&] { return fake_verbs_count("work_requests") >= before + 3; }));
  w.b->deregister(w.rb);
  fake_verbs_release(puller);
  finish(t, State::kFailed);
  CHECK(t->failure.code == Code::kRemoteAccess);
  CHECK(w.alive());
}

TEST_CASE("verbs: a cancelled read is quiesced when the NIC is through") {
  World w;
  const uint32_t puller = w.puller_of_a();
  fake_verbs_hold(puller);
  const int64_t before = fake_verbs_count("work_requests");
  const TransferPtr t = w.move(Op::kRead, 0, 0, kBytes);
  REQUIRE(eventually([&] { return fake_verbs_count("work_requests") >= before + 3; }));
  w.a->cancel(t);
  CHECK(t->state.load() == State::kCancelled);
  CHECK(t->agreed);
  CHECK_FALSE(t->quiesced.load());
  fake_verbs_release(puller);
  CHECK(quiesces(t));
  finish(w.move(Op::kRead, 0, 0, kBytes));
}

TEST_CASE("verbs: READs that are not answered are tried again on fresh queue pairs") {
  World w;
  const uint32_t source = w.source_of_a();
  fake_verbs_hold(source);  // for ever: what is held for it is never delivered
  finish(w.move(Op::kWrite, 0, 0, kBytes));
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
  fake_verbs_release(source);
  finish(w.move(Op::kWrite, 0, 0, kBytes));
  CHECK(w.alive());
}

TEST_CASE("verbs: a network that loses, delays and repeats costs time alone") {
  World w;
  for (int64_t i = 0; i < kBytes; ++i) w.at_a(0)[i] = static_cast<std::byte>(i * 7 + i / 251);
  Plan plan("seed=5 drop=0.01 lose_ack=0.01 delay=0.2:1ms duplicate=0.1:1ms hold_cqe=0.1:1ms");
  for (int round = 0; round < 3; ++round) {
    std::memset(w.at_b(0), 0, kBytes);
    finish(w.move(Op::kWrite, 0, 0, kBytes));
    CHECK(std::memcmp(w.at_a(0), w.at_b(0), kBytes) == 0);
    finish(w.move(Op::kRead, kBytes, 0, kBytes));
    CHECK(std::memcmp(w.at_a(0), w.at_a(kBytes), kBytes) == 0);
  }
  CHECK(w.alive());
}

// Every request ends once, whole or with an error of a type; nothing hangs and nothing else lands.
static void endure(World& w, int count) {
  std::vector<TransferPtr> transfers;
  for (int i = 0; i < count; ++i)
    transfers.push_back(
        w.move(i % 3 == 2 ? Op::kRead : Op::kWrite, i % 3 == 2 ? kBytes : 0, 0, kBytes / 4));
  for (const TransferPtr& t : transfers) {
    REQUIRE(t->wait(deadline_after(60)) == Woken::kNotified);
    const State state = t->state.load();
    INFO(t->message);
    CHECK((state == State::kDone || state == State::kFailed || state == State::kTimedOut));
    CHECK(quiesces(t));
  }
}

TEST_CASE("verbs: completions with errors end requests once") {
  for (const char* text :
       {"seed=1 error=0.02:retry_exc", "seed=2 error=0.02:rem_access", "seed=3 error=0.05:any",
        "seed=4 post=0.05", "seed=5 short_poll=0.8", "seed=6 qp_fatal=7"}) {
    CAPTURE(text);
    World w;
    Plan plan(text);
    endure(w, 30);
  }
}

TEST_CASE("verbs: removing the device ends everything, and says so") {
  World w;
  HeldWrite held(w, w.puller_of_b());
  const TransferPtr read = w.move(Op::kRead, kBytes, 0, kBytes);
  REQUIRE(fake_verbs_remove_device("fake0") == 0);
  for (const TransferPtr& t : {held.transfer, read}) {
    REQUIRE(t->wait(deadline_after(30)) == Woken::kNotified);
    CHECK(t->state.load() == State::kFailed);
    CHECK(quiesces(t));
  }
  CHECK(eventually([&] { return !w.alive(); }));
  // Nothing would reach memory that is registered now.
  std::string why;
  CHECK(eventually([&] {
    try {
      (void)w.a->allocate(4096, {.name = "late"});
      why = "allocated";
    } catch (const Error& error) {
      why = error.what();
    }
    return why.find("the engine's RDMA device, was lost") != std::string::npos;
  }));
  INFO(why);
  CHECK(why.find("make a new engine") != std::string::npos);
  CHECK(fake_verbs_restore_device("fake0") == 0);
}

TEST_CASE("verbs: a port that goes down ends its connections, and is refused with the reason") {
  World w;
  HeldWrite held(w, w.puller_of_b());
  REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
  REQUIRE(held.transfer->wait(deadline_after(30)) == Woken::kNotified);
  CHECK(held.transfer->state.load() == State::kFailed);
  // Whichever side hears of its own port first ends the session for both.
  const Code code = held.transfer->failure.code;
  CHECK((code == Code::kTransport || code == Code::kPeerDisconnected));
  CHECK(quiesces(held.transfer));
  REQUIRE(eventually([&] { return !w.alive(); }));
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "c";
  CHECK_THROWS_WITH_AS(Engine::create(options), doctest::Contains("port 1 is down"), Error);
  REQUIRE(fake_verbs_set_port("fake0", 1, 1) == 0);
}

TEST_CASE("verbs: memory that cannot be pinned is an error that names the limit") {
  Plan plan("memlock=3000000");
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "a";
  const auto engine = Engine::create(options);
  engine->allocate(1 << 16, {.name = "small"});
  try {
    engine->allocate(1 << 22, {.name = "large"});
    FAIL("it was registered");
  } catch (const Error& error) {
    CHECK(error.code == Code::kRegistration);
    CHECK(std::string(error.what()).find("locked-memory limit") != std::string::npos);
    CHECK(std::string(error.what()).find("'large'") != std::string::npos);
  }
  engine->allocate(1 << 16, {.name = "large"});  // the name is free again
  engine->close();
}

TEST_CASE("verbs: what cannot be pinned by default goes in messages") {
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "a";
  const auto a = Engine::create(options);
  const auto source = a->allocate(kBytes, {.name = "kv"});
  std::memset(source->pieces[0].base, 0x77, kBytes);
  options.transports = {};  // any: shm would be taken first, so a connects and allows verbs alone
  options.name = "b";
  const auto b = Engine::create(options);
  RegionPtr target;
  {
    Plan plan("memlock=1");
    target = b->allocate(kBytes, {.name = "kv"});
  }
  CHECK(target->exposures.at(0)->state() == Exposure::State::kFailed);
  CHECK(target->exposures.at(0)->text().find("locked-memory limit") != std::string::npos);
  const PeerPtr peer = a->connect(b->address(), 10);
  const int64_t at = 0;
  const Column column{&at, 1, true}, nbytes{&kBytes, 1, true};
  SubmitOptions patient;
  patient.deadline_ns = deadline_after(30);
  finish(a->submit(Op::kWrite, source, a->regions_of(*peer).at("kv"),
                   SpanArguments{column, column, nbytes, {}, false}, patient));
  CHECK(all_equal(target->pieces[0].base, kBytes, 0x77));
  CHECK(a->explain(*peer).find("uses verbs") != std::string::npos);
  a->close();
  b->close();
}
