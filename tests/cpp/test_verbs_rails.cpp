// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines joined by two rails of software NICs: what is striped, and what happens when one of
// them fails, comes back, or both are gone. Run with KVXFER_FAKE_VERBS=devices=2.
#include <poll.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>

#include "transport/verbs/nearness.hpp"
#include "verbs_rails_world.hpp"

using namespace rails;

namespace {

size_t num_descriptors() {
  size_t n = 0;
  for ([[maybe_unused]] const auto& each : std::filesystem::directory_iterator("/proc/self/fd"))
    ++n;
  return n;
}

}  // namespace

TEST_CASE("rails: large requests are striped over both, small ones stay on one") {
  World w;
  finish(w.write());
  CHECK(w.same());
  finish(w.read());
  CHECK(std::memcmp(w.at_a(kBytes), w.at_b(0), kBytes) == 0);
  for (const auto& carried : {w.writes(), w.reads()}) {
    REQUIRE(carried.size() == 2);
    for (const auto& rail : carried) CHECK(rail.chains >= 2);
    CHECK(total(carried) == kBytes);
  }
  const auto before = w.writes();
  for (int i = 0; i < 10; ++i) finish(w.write(4096));
  const auto after = w.writes();
  CHECK(after[0].chains == before[0].chains + 10);
  CHECK(after[1].chains == before[1].chains);
  const std::string text = w.a->explain(*w.to_b);
  for (const char* part :
       {"2 rail(s)", "rail 0: fake0:1", "rail 1: fake1:1", "10.77.0.1", "10.77.1.1", "NUMA node"})
    CHECK_MESSAGE(text.find(part) != std::string::npos, text);
}

TEST_CASE("rails: scattered blocks of many pieces go over both, with the keys of each") {
  World w;
  // Blocks that are neighbours nowhere, many chains of them.
  constexpr int64_t kBlock = 4096, kCount = 1024;
  std::vector<int64_t> local(kCount), into(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    local[static_cast<size_t>(i)] = i * 2 * kBlock;
    into[static_cast<size_t>(i)] = (i * 389 % kCount) * 2 * kBlock;
  }
  SubmitOptions options;
  options.deadline_ns = deadline_after(30);
  finish(w.a->submit(Op::kWrite, w.ra, w.remote,
                     SpanArguments{{local.data(), kCount, false},
                                   {into.data(), kCount, false},
                                   {&kBlock, 1, true},
                                   {},
                                   false},
                     options));
  bool same = true;
  for (size_t i = 0; i < kCount; ++i)
    same &= std::memcmp(w.at_a(static_cast<size_t>(local[i])), w.at_b(static_cast<size_t>(into[i])),
                        kBlock) == 0;
  CHECK(same);
  for (const auto& rail : w.writes()) CHECK(rail.chains >= 2);
}

TEST_CASE("rails: a port that goes in the middle of a request costs its chains alone") {
  World w;
  const uint32_t puller = w.writes()[1].puller;
  fake_verbs_hold(puller);
  const TransferPtr t = w.write();
  REQUIRE(eventually([&] { return w.writes()[0].chains >= 3; }));
  CHECK(t->state.load() != State::kDone);
  REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
  finish(t);
  CHECK(w.same());
  // Each chain came through once: what had landed was not read again.
  CHECK(total(w.writes()) == kBytes);
  CHECK(w.writes()[1].nbytes == 0);
  CHECK_FALSE(w.in_use(1));
  CHECK(w.alive());
  CHECK(w.a->explain(*w.to_b).find("not in use") != std::string::npos);
  std::memset(w.at_b(0), 0xEE, kBytes);
  fake_verbs_release(puller);
  ::poll(nullptr, 0, 20);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));  // nothing of the rail that was left comes late

  finish(w.write());  // with one rail
  finish(w.read());
  CHECK(w.same());

  REQUIRE(fake_verbs_set_port("fake1", 1, 1) == 0);
  REQUIRE(eventually([&] { return w.both_in_use(); }));
  const auto before = w.writes();
  finish(w.write());
  for (size_t rail : {0, 1}) CHECK(w.writes()[rail].chains >= before[rail].chains + 2);
  CHECK(w.same());
}

TEST_CASE("rails: one that is silent is given up, tried again, and used when it answers") {
  World w;
  REQUIRE(fake_verbs_cut_port("fake1", 1, 1) == 0);
  const TransferPtr write = w.write(), read = w.move(Op::kRead, 2 * kBytes, 2 * kBytes, kBytes);
  finish(write);
  finish(read);
  CHECK(w.same());
  CHECK(total(w.writes()) == kBytes);
  CHECK(total(w.reads()) == kBytes);
  CHECK_FALSE(w.in_use(1));
  // It goes on being tried, and nobody is troubled by that.
  const int64_t timeouts = fake_verbs_count("timeouts");
  REQUIRE(eventually([&] { return fake_verbs_count("timeouts") > timeouts + 20; }));
  finish(w.write());
  CHECK(w.alive());
  REQUIRE(fake_verbs_cut_port("fake1", 1, 0) == 0);
  REQUIRE(eventually([&] { return w.both_in_use(); }));
  const auto before = w.writes();
  finish(w.write());
  CHECK(w.writes()[1].chains >= before[1].chains + 2);
}

TEST_CASE("rails: a queue pair that breaks is replaced while the other rail goes on") {
  for (const size_t which : {0, 1}) {
    CAPTURE(which);
    World w;
    const uint32_t puller = w.writes()[which].puller;
    fake_verbs_hold(puller);
    const TransferPtr t = w.write();
    REQUIRE(eventually([&] { return w.writes()[1 - which].chains >= 2; }));
    REQUIRE(fake_verbs_break_qp(puller) == 0);
    finish(t);
    CHECK(w.same());
    CHECK(total(w.writes()) == kBytes);
    fake_verbs_release(puller);
    REQUIRE(eventually([&] { return w.both_in_use(); }));
    const auto before = w.writes();
    finish(w.write());
    for (size_t rail : {0, 1}) CHECK(w.writes()[rail].chains > before[rail].chains);
  }
}

TEST_CASE("rails: a device that is removed leaves the other, also for new regions and peers") {
  World w;
  const TransferPtr t = w.write();
  REQUIRE(fake_verbs_remove_device("fake1") == 0);
  finish(t);
  CHECK(w.same());
  REQUIRE(eventually([&] { return !w.in_use(1); }));
  const RegionPtr more = w.b->allocate(kBytes, {.name = "more"});
  REQUIRE(eventually([&] { return w.a->regions_of(*w.to_b).contains("more"); }));
  const int64_t at = 0;
  const Column column{&at, 1, true}, nbytes{&kBytes, 1, true};
  SubmitOptions options;
  options.deadline_ns = deadline_after(30);
  finish(w.a->submit(Op::kWrite, w.ra, w.a->regions_of(*w.to_b).at("more"),
                     SpanArguments{column, column, nbytes, {}, false}, options));
  CHECK(std::memcmp(more->pieces[0].base, w.at_a(0), kBytes) == 0);
  CHECK(w.alive());
  const PeerPtr again = w.b->connect(w.a->address(), 10);
  CHECK(w.b->explain(*again).find("rail 0: fake0:1") != std::string::npos);
}

TEST_CASE("rails: when none is left, requests end with an error that says so") {
  {
    World w;
    // READs fail on whichever rail they are tried, while messages go on.
    REQUIRE(fake_verbs_plan("seed=1 read_error=1:retry_exc") == 0);
    const TransferPtr t = w.read();
    finish(t, State::kFailed);
    CHECK(t->failure.code == Code::kPeerDisconnected);
    CHECK_MESSAGE(t->failure.text.find("no rail is left") != std::string::npos, t->failure.text);
    CHECK(quiesces(t));
  }
  {
    World w;
    HeldWrite held(w, kBytes, {});
    REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
    REQUIRE(eventually([&] { return !w.in_use(1); }));
    CHECK(held.transfer->state.load() == State::kPosted);
    REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
    finish(held.transfer, State::kFailed);
    const Code code = held.transfer->failure.code;
    CHECK((code == Code::kTransport || code == Code::kPeerDisconnected));
    CHECK(quiesces(held.transfer));
    CHECK(eventually([&] { return !w.alive(); }));
  }
  check_empty();
}

TEST_CASE("rails: a write on both when its lease is revoked does not land from either") {
  World w;
  const LeasePtr lease = w.grant(0, kBytes, 1);
  HeldWrite held(w, 4 * kMiB, under(lease));
  w.b->begin_revoke(lease);
  CHECK_FALSE(lease->gate.quiet());
  REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  std::memset(w.at_b(0), 0xEE, kBytes);  // reused at once
  held.release();
  finish(held.transfer, State::kFailed);
  CHECK(held.transfer->failure.code == Code::kLease);
  ::poll(nullptr, 0, 20);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  CHECK(w.alive());
  REQUIRE(eventually([&] { return w.both_in_use(); }));
  finish(w.write());
  CHECK(w.same());
}

TEST_CASE("rails: a rail fails while a lease is being revoked, and what is quiet stays so") {
  World w;
  const LeasePtr lease = w.grant(0, kBytes, 1);
  HeldWrite held(w, 4 * kMiB, under(lease));
  w.b->begin_revoke(lease);
  REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
  REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  std::memset(w.at_b(0), 0xEE, kBytes);
  held.release();
  finish(held.transfer, State::kFailed);
  ::poll(nullptr, 0, 20);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  CHECK(w.alive());
}

TEST_CASE("rails: a cancelled write's source is taken back on both") {
  World w;
  const LeasePtr lease = w.grant(0, kBytes, 2);
  HeldWrite held(w, 4 * kMiB, arriving(lease, 0));
  w.a->cancel(held.transfer);
  CHECK(held.transfer->state.load() == State::kCancelled);
  CHECK_FALSE(held.transfer->agreed);
  CHECK_FALSE(held.transfer->quiesced.load());
  check_retry_alone_is_accepted(w, lease, held.transfer, [&] { held.release(); });
  const std::string text = w.a->explain(*w.to_b);
  CHECK_MESSAGE(text.find(", 0 queue pair(s) replaced") == std::string::npos, text);
}

TEST_CASE("rails: the words of a read speak for what every rail has brought") {
  for (const size_t late : {0, 1}) {
    CAPTURE(late);
    World w;
    std::memset(w.at_b(0), 0x44, kBytes);
    const LeasePtr lease = w.grant(0, kBytes);
    const uint32_t puller = w.reads()[late].puller;
    fake_verbs_hold(puller);
    const TransferPtr t = w.read(4 * kMiB, under(lease));
    REQUIRE(eventually([&] { return w.reads()[1 - late].chains >= 2; }));
    ::poll(nullptr, 0, 20);  // for words that were read too soon
    w.b->begin_revoke(lease);
    CHECK(lease->gate.quiet());
    std::memset(w.at_b(0), 0x55, kBytes);
    fake_verbs_release(puller);
    finish(t, State::kFailed);
    CHECK(t->failure.code == Code::kLease);
    CHECK(w.alive());
    finish(w.read());
    CHECK(all_equal(w.at_a(kBytes), kBytes, 0x55));
  }
}

TEST_CASE("rails: chains go to the NIC at the memory's node, unless devices were named") {
  char folder[] = "/tmp/kvxfer-sysfs-XXXXXX";
  REQUIRE(::mkdtemp(folder) != nullptr);
  const int node = [] {
    std::vector<std::byte> memory(1 << 16, std::byte{1});
    verbs::NodeOfMemory nodes;
    nodes.look_at(memory.data(), memory.size());
    return nodes.node();
  }();
  // Where it cannot be asked, all are alike.
  const bool is_known = node != verbs::kNoNode;
  for (const int device : {0, 1}) {
    const auto path = std::filesystem::path(folder) / ("fake" + std::to_string(device)) / "device";
    std::filesystem::create_directories(path);
    std::ofstream(path / "numa_node") << (device == 1 ? std::max(node, 0) : node + 1) << "\n";
  }
  const Whole whole;
  const std::string plan = std::string("devices=2 sysfs=") + folder;
  const auto remake = [](const std::string& text) {
    REQUIRE(fake_verbs_plan(text.c_str()) == 0);
    for (const char* device : {"fake0", "fake1"}) {
      REQUIRE(fake_verbs_remove_device(device) == 0);
      REQUIRE(fake_verbs_restore_device(device) == 0);
    }
  };
  remake(plan);
  {
    World w;
    const std::string prefers =
        "'kv': " + w.ra->backing.text + "; verbs " + w.ra->exposures[0]->text();
    CHECK(prefers.find(is_known ? cat("prefers fake1:1 (at NUMA node ", node,
                                      ") to fake0:1 (elsewhere, or unknown)")
                                : "prefers no NIC: nothing is known") != std::string::npos);
    CHECK(w.a->explain(*w.to_b).find(prefers) != std::string::npos);
    finish(w.write());
    finish(w.read());
    CHECK(w.same());
    for (const auto& carried : {w.writes(), w.reads()}) {
      CHECK(carried[1].chains > 0);
      CHECK((carried[0].chains == 0) == is_known);
    }
    // What is near is gone: better far than not at all.
    REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
    finish(w.write());
    CHECK(w.writes()[0].chains > 0);
  }
  {
    World w(impatient("fake0,fake1"));
    finish(w.write());
    for (const auto& rail : w.writes()) CHECK(rail.chains > 0);
  }
  remake("devices=2");
  std::filesystem::remove_all(folder);
}

TEST_CASE("rails: devices are named one by one, and one that is not there is an error") {
  const Whole whole;
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "c";
  options.transport.verbs_device = "fake1:1,fake0";
  {
    World w(options.transport);
    CHECK(w.a->explain(*w.to_b).find("rail 0: fake1:1") != std::string::npos);
  }
  for (const char* missing : {"fake0,fake7", "fake0,fake1:2"}) {
    options.transport.verbs_device = missing;
    CHECK_THROWS_WITH_AS(Engine::create(options), doctest::Contains(missing), Error);
  }
  options.transport.verbs_device = "fake0,fake1";
  REQUIRE(fake_verbs_set_port("fake1", 1, 0) == 0);
  CHECK_THROWS_WITH_AS(Engine::create(options), doctest::Contains("fake1 port 1 is down"), Error);
}

TEST_CASE("rails: a side with one port has one rail, and says what is left over") {
  World w;
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.transport = impatient("fake1");
  options.name = "c";
  const auto c = Engine::create(options);
  const RegionPtr region = c->allocate(kBytes, {.name = "kv"});
  const PeerPtr to_c = w.a->connect(c->address(), 10);
  const std::string text = w.a->explain(*to_c);
  for (const char* part : {"1 rail(s)", "rail 0: fake1:1", "in no rail: 1 port(s) of ours"})
    CHECK_MESSAGE(text.find(part) != std::string::npos, text);
  const int64_t at = 0;
  const Column column{&at, 1, true}, nbytes{&kBytes, 1, true};
  SubmitOptions patient;
  patient.deadline_ns = deadline_after(30);
  finish(w.a->submit(Op::kWrite, w.ra, w.a->regions_of(*to_c).at("kv"),
                     SpanArguments{column, column, nbytes, {}, false}, patient));
  CHECK(std::memcmp(region->pieces[0].base, w.at_a(0), kBytes) == 0);
  c->close();
}

TEST_CASE("rails: two ports may be joined by several queue pairs, which fail together") {
  TransportConfig config = impatient("fake0");
  config.verbs_queue_pairs = 3;
  World w(config);
  REQUIRE(w.writes().size() == 3);
  REQUIRE(eventually([&] { return w.in_use(2); }));
  // Each side tries its rails before it uses them, and takes another only while one is busy.
  uint64_t num_rounds = 0;
  REQUIRE(eventually([&] {
    finish(w.write());
    finish(w.read());
    ++num_rounds;
    const auto carries = [](const auto& rail) { return rail.chains >= 1; };
    return std::ranges::all_of(w.writes(), carries) && std::ranges::all_of(w.reads(), carries);
  }));
  CHECK(w.same());
  CHECK(total(w.writes()) == num_rounds * kBytes);
  // One breaks, the others go on.
  REQUIRE(fake_verbs_break_qp(w.writes()[2].puller) == 0);
  finish(w.write());
  REQUIRE(eventually([&] { return w.in_use(2); }));
  CHECK(w.alive());
  REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
  CHECK(eventually([&] { return !w.alive(); }));
}

// The port of the second rail goes and comes all the time; what is done is right, what is quiet
// stays so, and nothing is left behind.
TEST_CASE("rails: one that flaps harms nobody") {
  const size_t before = num_descriptors();
  for (int seed = 1; seed <= 3; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(static_cast<uint32_t>(seed));
    World w;
    REQUIRE(fake_verbs_plan(("seed=" + std::to_string(seed) +
                             " delay=0.05:1ms duplicate=0.05:1ms hold_cqe=0.05:1ms short_poll=0.3")
                                .c_str()) == 0);
    bool up = true;
    for (int i = 0; i < 40; ++i) {
      if (random() % 2) REQUIRE(fake_verbs_set_port("fake1", 1, up = !up) == 0);
      if (random() % 8 == 0) fake_verbs_break_qp(w.reads()[random() % 2].puller);
      const int value = i + 1;
      std::memset(w.at_a(0), value, 3 * kMiB);
      const TransferPtr write = w.write(3 * kMiB);
      if (random() % 4 == 0) {
        w.a->cancel(write);
        REQUIRE(quiesces(write));
        std::memset(w.at_a(0), 0xEE, 3 * kMiB);  // quiet: never seen by anybody
        continue;
      }
      if (random() % 2) REQUIRE(fake_verbs_set_port("fake1", 1, up = !up) == 0);
      finish(write);
      REQUIRE(all_equal(w.at_b(0), 3 * kMiB, value));
      finish(w.read(3 * kMiB));
      REQUIRE(all_equal(w.at_a(kBytes), 3 * kMiB, value));
    }
    CHECK(w.alive());
  }
  check_empty();
  CHECK(num_descriptors() == before);
}
