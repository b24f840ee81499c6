// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Registered memory: in the background, shared by range, and what is said when it cannot be had.
#include <chrono>
#include <functional>
#include <thread>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"
#include "transport/verbs/connection.hpp"
#include "verbs_plan.hpp"

using namespace kvxfer;
using Progress = Exposure::State;

namespace {

constexpr uint64_t kPart = 1 << 20, kNbytes = 4 * kPart;

bool eventually(const std::function<bool()>& done) { return eventually_within(20, done); }

// Everything beyond one part is registered in the background, part by part.
TransportConfig in_background() {
  TransportConfig config = impatient();
  config.verbs_background_nbytes = kPart;
  config.verbs_part_nbytes = kPart;
  return config;
}

std::shared_ptr<Engine> engine(const std::string& name, std::vector<std::string> transports,
                               const TransportConfig& config = in_background()) {
  EngineOptions options;
  options.name = name;
  options.secret = Bytes(32, std::byte{1});
  options.transports = std::move(transports);
  options.transport = config;
  auto engine = Engine::create(options);
  // With the first region the words of leases and regions are registered, by who makes it.
  engine->allocate(4096, {.name = "before"});
  return engine;
}

struct Closing {
  std::shared_ptr<Engine> engine;
  ~Closing() { engine->close(); }
  Engine* operator->() const { return engine.get(); }
};

int64_t count(const char* name) { return fake_verbs_count(name); }

// Holds registrations from the nth on; the test must make another plan before it ends.
struct Held : Plan {
  explicit Held(int nth) : Plan("hold_reg=" + std::to_string(nth)) {}
  static void wait() {
    REQUIRE(eventually([] { return count("registering") > 0; }));
  }
};

Exposure& of(const RegionPtr& region) { return *region->exposures.at(0); }
bool ends(const RegionPtr& region, Progress how) {
  REQUIRE(of(region).wait(deadline_after(20)) == Woken::kNotified);
  INFO(of(region).text());
  return of(region).state() == how;
}

TransferPtr move(Engine& from, Op op, const RegionPtr& local, const RemoteRegionPtr& remote,
                 int64_t nbytes = kNbytes) {
  const int64_t at = 0;
  const Column column{&at, 1, true}, size{&nbytes, 1, true};
  SubmitOptions patient;
  patient.deadline_ns = deadline_after(30);
  return from.submit(op, local, remote, SpanArguments{column, column, size, {}, false}, patient);
}

// Memory of the test's own, which regions are made of as often as it likes.
struct Memory {
  std::shared_ptr<std::vector<std::byte>> bytes =
      std::make_shared<std::vector<std::byte>>(kNbytes, std::byte{0x5A});
  RegionPtr in(Engine& engine, RegionOptions options, bool writable = true) const {
    return engine.register_pieces({{bytes->data(), 0, bytes->size()}}, writable, bytes,
                                  std::move(options));
  }
};

}  // namespace

TEST_CASE("verbs memory: a large region is usable at once, and tells how far it is") {
  Pair w(1 << 16, "127.0.0.1:0", in_background());
  const RegionPtr mirror = w.b->allocate(kPart / 2, {.name = "mirror"});
  REQUIRE(eventually([&] { return w.a->regions_of(*w.to_b).contains("mirror"); }));
  const int64_t locked = count("locked_bytes");
  RegionPtr large;
  {
    const Held held(3);
    large = w.a->allocate(kNbytes, {.name = "large"});
    std::memset(large->pieces[0].base, 0x21, kNbytes);
    Held::wait();
    CHECK(of(large).state() == Progress::kRunning);
    CHECK(of(large).nbytes_done.load() == 2 * kPart);
    CHECK(of(large).nbytes % kNbytes == 0);
    CHECK(of(large).wait(deadline_after(0.01)) == Woken::kTimedOut);
    const auto stats = w.a->stats().registration.at("verbs");
    CHECK(stats.regions == 2);
    CHECK(stats.running == 1);
    CHECK(stats.nbytes - stats.nbytes_done == of(large).nbytes - 2 * kPart);
    CHECK(w.a->explain(*w.to_b).find("'large'") != std::string::npos);
    CHECK(w.a->explain(*w.to_b).find("2097152 of ") != std::string::npos);

    // Its bytes go, in messages, as source and as destination, for us and for the peer.
    const auto remote = w.a->regions_of(*w.to_b).at("mirror");
    finish(move(*w.a, Op::kWrite, large, remote, kPart / 2));
    CHECK(all_equal(mirror->pieces[0].base, kPart / 2, 0x21));
    std::memset(mirror->pieces[0].base, 0x22, kPart / 2);
    finish(move(*w.a, Op::kRead, large, remote, kPart / 2));
    CHECK(all_equal(large->pieces[0].base, kPart / 2, 0x22));
    PeerPtr to_a;
    REQUIRE(eventually([&] {
      for (const PeerEvent& event : w.b->peer_events()) to_a = event.peer;
      return to_a && w.b->regions_of(*to_a).contains("large");
    }));
    const auto theirs = w.b->regions_of(*to_a).at("large");
    finish(move(*w.b, Op::kWrite, mirror, theirs, kPart / 2));
    finish(move(*w.b, Op::kRead, mirror, theirs, kPart / 2));
    CHECK(all_equal(mirror->pieces[0].base, kPart / 2, 0x22));
  }
  REQUIRE(ends(large, Progress::kDone));
  CHECK(of(large).nbytes_done.load() == of(large).nbytes);
  CHECK(w.a->stats().registration.at("verbs").running == 0);
  CHECK(w.a->explain(*w.to_b).find("registers it") == std::string::npos);

  // From here on the NICs move them, across the parts too.
  const RegionPtr whole = w.b->allocate(kNbytes, {.name = "whole"});
  REQUIRE(ends(whole, Progress::kDone));
  REQUIRE(eventually([&] { return w.a->regions_of(*w.to_b).contains("whole"); }));
  const auto remote = w.a->regions_of(*w.to_b).at("whole");
  std::memset(large->pieces[0].base, 0x33, kNbytes);
  const int64_t received = count("receives");
  finish(move(*w.a, Op::kWrite, large, remote));
  CHECK(all_equal(whole->pieces[0].base, kNbytes, 0x33));
  std::memset(whole->pieces[0].base, 0x44, kNbytes);
  finish(move(*w.a, Op::kRead, large, remote));
  CHECK(all_equal(large->pieces[0].base, kNbytes, 0x44));
  CHECK(count("receives") - received < 100);  // messages of 4 KiB would be 2048
  w.a->deregister(large);
  w.b->deregister(whole);
  REQUIRE(eventually([&] { return count("locked_bytes") < locked + 2 * int64_t{kPart}; }));
}

TEST_CASE("verbs memory: deregistering stops a registration, and nothing stays pinned") {
  const Closing a{engine("a", {"verbs"})};
  const int64_t locked = count("locked_bytes");
  RegionPtr region, next;
  std::thread leaving;
  {
    const Held held(2);
    region = a->allocate(kNbytes, {.name = "kv"});
    next = a->allocate(kNbytes, {.name = "next"});
    Held::wait();
    a->deregister(next);  // waits in line: gone at once
    CHECK(of(next).state() == Progress::kDropped);
    leaving = std::thread([&] { a->deregister(region); });
    // It waits for the call of the device that is under way, and for no other.
    REQUIRE(eventually([&] { return region->gate.closed(); }));
    CHECK(of(region).state() == Progress::kRunning);
  }
  leaving.join();
  CHECK(of(region).state() == Progress::kDropped);
  CHECK(of(region).nbytes_done.load() == 0);
  CHECK(count("locked_bytes") == locked);
  CHECK(ends(a->allocate(kNbytes, {.name = "kv"}), Progress::kDone));  // the thread goes on
}

TEST_CASE("verbs memory: an engine closes while regions are registered") {
  const int64_t regions = count("regions");
  {
    const Closing a{engine("a", {"verbs"})};
    RegionPtr first, second;
    std::thread closing;
    {
      const Held held(2);
      first = a->allocate(kNbytes, {.name = "first"});
      second = a->allocate(kNbytes, {.name = "second"});
      Held::wait();
      closing = std::thread([&] { a->close(); });
      REQUIRE(eventually([&] { return of(second).state() == Progress::kDropped; }));
    }
    closing.join();
    CHECK(of(first).state() == Progress::kDropped);
    CHECK_THROWS_AS(a->allocate(kNbytes, {.name = "third"}), Error);
  }
  CHECK(count("regions") == regions);
}

TEST_CASE("verbs memory: a failure in the background is met by who uses the region") {
  const Closing a{engine("a", {"verbs"})}, b{engine("b", {"verbs"})};
  const RegionPtr small = b->allocate(1 << 16, {.name = "small"});
  const PeerPtr peer = a->connect(b->address(), 10);
  const auto remote = a->regions_of(*peer).at("small");
  const int64_t locked = count("locked_bytes");
  RegionPtr region;
  {
    const Held held(3);
    region = a->allocate(kNbytes, {.name = "kv"});
    Held::wait();
    REQUIRE(fake_verbs_plan("fail=reg_mr@1:ENOMEM") == 0);  // the one that was held
    REQUIRE(ends(region, Progress::kFailed));
  }
  CHECK(of(region).err() == ENOMEM);
  const uint64_t num_rails = of(region).nbytes / region->nbytes;
  const std::string part = "part " + std::to_string(2 / num_rails) + " of region 'kv'";
  CHECK(of(region).text().find(part) != std::string::npos);
  CHECK(of(region).text().find("after 2097152 of ") != std::string::npos);
  CHECK(count("locked_bytes") == locked);
  CHECK_THROWS_WITH_AS(move(*a.engine, Op::kWrite, region, remote, 4096),
                       doctest::Contains(part.c_str()), Error);
  const int64_t at = 0, size = 4096;
  CHECK_THROWS_WITH_AS(a->grant(region, {&at, 1, true}, {&size, 1, true}, 60, {}, 0),
                       doctest::Contains(part.c_str()), Error);
  CHECK(a->stats().registration.at("verbs").failed == 1);
  a->deregister(region);
}

TEST_CASE("verbs memory: where nobody asked for verbs, a failure in the background is a reason") {
  const Closing a{engine("a", {"verbs"})}, b{engine("b", {})};
  Plan plan("fail=reg_mr@2:ENOMEM");
  const RegionPtr target = b->allocate(kNbytes, {.name = "kv"});
  REQUIRE(ends(target, Progress::kFailed));
  fake_verbs_plan("");
  const RegionPtr source = a->allocate(kNbytes, {.name = "kv"});
  REQUIRE(ends(source, Progress::kDone));
  std::memset(source->pieces[0].base, 0x66, kNbytes);
  const PeerPtr peer = a->connect(b->address(), 10);
  finish(move(*a.engine, Op::kWrite, source, a->regions_of(*peer).at("kv")));
  CHECK(all_equal(target->pieces[0].base, kNbytes, 0x66));
  PeerPtr to_a;
  REQUIRE(eventually([&] {
    for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
    return to_a != nullptr;
  }));
  CHECK(b->explain(*to_a).find("'kv'") != std::string::npos);
  CHECK(b->explain(*to_a).find("not for verbs: ibv_reg_mr(") != std::string::npos);
}

TEST_CASE("verbs memory: a device that goes while a region is registered is a reason") {
  const Closing a{engine("a", {})};
  RegionPtr region;
  {
    const Held held(2);
    region = a->allocate(kNbytes, {.name = "kv"});
    Held::wait();
    REQUIRE(fake_verbs_remove_device("fake0") == 0);
  }
  // With another rail it may also have been heard of in time: then the others have the region.
  if (of(region).nbytes == region->nbytes || !ends(region, Progress::kDone)) {
    CHECK(ends(region, Progress::kFailed));
    CHECK(of(region).err() == EIO);
  }
  REQUIRE(fake_verbs_restore_device("fake0") == 0);
}

TEST_CASE("verbs memory: what is too long for one registration has several") {
  const char* const tight = "max_mr_size=600000";  // less than a connection wants for its messages
  Plan plan(tight);
  const Closing a{engine("a", {"verbs"}, impatient())}, b{engine("b", {"verbs"}, impatient())};
  fake_verbs_plan("");
  const PeerPtr peer = a->connect(b->address(), 10);
  fake_verbs_plan(tight);
  const int64_t regions = count("regions");
  const RegionPtr here = a->allocate(kNbytes, {.name = "long"});
  const RegionPtr there = b->allocate(kNbytes, {.name = "long"});
  CHECK(of(here).state() == Progress::kDone);  // at once: it is small, however many parts it has
  const auto num_rails = static_cast<int64_t>(of(here).nbytes / kNbytes);
  CHECK(count("regions") == regions + 2 * num_rails * 7);
  for (uint64_t i = 0; i < kNbytes; ++i) here->pieces[0].base[i] = static_cast<std::byte>(i / 4093);
  REQUIRE(eventually([&] { return a->regions_of(*peer).contains("long"); }));
  const int64_t received = count("receives");
  finish(move(*a.engine, Op::kWrite, here, a->regions_of(*peer).at("long")));
  CHECK(std::memcmp(here->pieces[0].base, there->pieces[0].base, kNbytes) == 0);
  CHECK(count("receives") - received < 100);
}

TEST_CASE("verbs memory: what was never a region's id is an error, and waited for by nobody") {
  verbs::MemoryTable table;
  CHECK_THROWS_WITH_AS(table.remove(0), doctest::Contains("region 0"), Error);
  table.remove(77);  // one that could not be registered, or has gone
}

TEST_CASE("verbs memory: many come and go at once") {
  const Closing a{engine("a", {"verbs"})};
  const int64_t locked = count("locked_bytes");
  std::vector<std::thread> threads;
  const Memory memory;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 12; ++i) {
        const auto name = std::to_string(t) + "." + std::to_string(i);
        const RegionPtr region = memory.in(*a.engine, {.name = name});
        if (i % 3 == 0) of(region).wait(deadline_after(20));
        if (i % 3 == 1) std::this_thread::sleep_for(std::chrono::microseconds(200 * i));
        a->deregister(region);
        CHECK(of(region).state() != Progress::kRunning);
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(count("locked_bytes") == locked);
}

// ---------------------------------------------------------------- shared by range

TEST_CASE("verbs memory: regions of one range share its registration, the last gives it back") {
  const Closing a{engine("a", {"verbs"})};
  const int64_t locked = count("locked_bytes");
  const Memory memory;
  const RegionPtr one = memory.in(*a.engine, {.name = "one"});
  REQUIRE(ends(one, Progress::kDone));
  const int64_t pinned = count("locked_bytes") - locked, regions = count("regions");
  CHECK(pinned >= int64_t{kNbytes});
  const RegionPtr two = memory.in(*a.engine, {.name = "two"});
  REQUIRE(ends(two, Progress::kDone));
  CHECK(of(two).nbytes_done.load() == of(two).nbytes);
  CHECK(count("locked_bytes") - locked == pinned);
  CHECK(count("regions") == regions);
  a->deregister(one);
  CHECK(count("locked_bytes") - locked == pinned);
  const RegionPtr three = memory.in(*a.engine, {.name = "three"});
  REQUIRE(ends(three, Progress::kDone));
  CHECK(count("locked_bytes") - locked == pinned);
  a->deregister(two);
  a->deregister(three);
  CHECK(count("locked_bytes") == locked);
}

TEST_CASE("verbs memory: no right is widened by sharing") {
  const Closing a{engine("a", {"verbs"})};
  const Memory memory;
  const RegionPtr open = memory.in(*a.engine, {.name = "open"});
  REQUIRE(ends(open, Progress::kDone));
  const auto pins_anew = [&](const std::string& what, auto&& make) {
    CAPTURE(what);
    const int64_t locked = count("locked_bytes");
    const RegionPtr region = make();
    REQUIRE(ends(region, Progress::kDone));
    CHECK(count("locked_bytes") >= locked + static_cast<int64_t>(region->nbytes));
    return region;
  };
  // A key of `open` would let peers read what only messages may carry, or without a lease.
  const auto never = pins_anew(
      "share=never", [&] { return memory.in(*a.engine, {.name = "never", .shareable = false}); });
  const auto leased = pins_anew("require_lease", [&] {
    return memory.in(*a.engine, {.name = "leased", .require_lease = true});
  });
  pins_anew("another that requires a lease",
            [&] { return memory.in(*a.engine, {.name = "leased too", .require_lease = true}); });
  pins_anew("read-only", [&] { return memory.in(*a.engine, {.name = "read-only"}, false); });
  // A key covers its whole registration: a part of a range is not the range.
  pins_anew("a part", [&] {
    return a->register_pieces({{memory.bytes->data(), 0, kPart - 4096}}, true, memory.bytes,
                              {.name = "part"});
  });
  // But two that nobody may read do share.
  const int64_t locked = count("locked_bytes");
  const RegionPtr never_too = memory.in(*a.engine, {.name = "never too", .shareable = false});
  REQUIRE(ends(never_too, Progress::kDone));
  CHECK(count("locked_bytes") == locked);
}

TEST_CASE("verbs memory: what a peer's READ still holds is not given to a new region") {
  // The user may have put other pages under the same addresses in between.
  Pair w(1 << 16, "127.0.0.1:0", in_background());
  const Memory memory;
  const RegionPtr old = memory.in(*w.b, {.name = "pool"});
  REQUIRE(ends(old, Progress::kDone));
  REQUIRE(eventually([&] { return w.a->regions_of(*w.to_b).contains("pool"); }));
  const auto before = w.a->regions_of(*w.to_b).at("pool");
  const auto verbs = w.to_b->links.at(0)->data.at(0);
  const int64_t locked = count("locked_bytes");

  const uint32_t puller = [&] {
    std::lock_guard lock(w.to_b->mutex);
    return dynamic_cast<verbs::VerbsConnection&>(*verbs).ends().rails[0].pull.number;
  }();
  fake_verbs_hold(puller);
  const int64_t posted = count("work_requests");
  const TransferPtr read = move(*w.a, Op::kRead, w.ra, before, 1 << 16);
  REQUIRE(eventually([&] { return count("work_requests") >= posted + 3; }));
  w.b->deregister(old);
  CHECK(count("locked_bytes") == locked);  // the READ needs it
  const RegionPtr fresh = memory.in(*w.b, {.name = "pool"});
  REQUIRE(ends(fresh, Progress::kDone));
  CHECK(count("locked_bytes") == locked + static_cast<int64_t>(of(fresh).nbytes));
  fake_verbs_release(puller);
  finish(read, State::kFailed);
  CHECK(eventually([&] { return count("locked_bytes") == locked; }));
}
