// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Pushed writes over software NICs whose packets the test holds in its hand: windows, their fence
// and their keys, and what is pulled instead.
#include <poll.h>

#include "verbs_push_world.hpp"

using namespace kvxfer;

TEST_CASE("push: writes under a lease go through its window; all others are pulled") {
  PushWorld w;
  const LeasePtr lease = w.grant(0, 4 * kBytes, 2);
  SubmitOptions options = under(lease);
  options.has_notify = options.has_arrival = true;
  options.notify = Bytes(3, std::byte{7});
  options.arrival = 1;
  finish(w.move(Op::kWrite, 0, 0, 3 * kBytes, std::move(options)));
  CHECK(all_equal(w.at_b(0), 3 * kBytes, 0x11));
  CHECK(w.at_b(3 * kBytes)[0] == std::byte{0});
  CHECK(lease->arrived(1));
  CHECK_FALSE(lease->arrived(0));
  CHECK(w.pushed() == 3 * kBytes);
  CHECK(w.pulled() == 0);
  CHECK(w.explains("pushed where they have a lease, of which 1 are known"));
  // Without a lease.
  finish(w.move(Op::kWrite, 0, 4 * kBytes, kBytes));
  CHECK(all_equal(w.at_b(4 * kBytes), kBytes, 0x11));
  CHECK(w.pulled() == kBytes);
  CHECK(w.pushed() == 3 * kBytes);
  w.revoke(lease);
  finish(w.write(lease), State::kFailed);
  CHECK(w.explains("of which 0 are known"));
  CHECK(w.explains("0 queue pair(s) of pushes replaced"));
}

TEST_CASE("push: scattered blocks land where they belong, gathered where they are neighbours") {
  PushWorld w;
  constexpr int64_t kBlock = 4096, kCount = 1500;  // more than a message has segments
  std::vector<int64_t> local(kCount), into(kCount), nbytes(kCount, kBlock);
  for (int64_t i = 0; i < kCount; ++i) {
    local[static_cast<size_t>(i)] = (i * 391 % kCount) * kBlock;
    into[static_cast<size_t>(i)] = i * kBlock;
    nbytes[static_cast<size_t>(i)] = i % 5 == 0 ? 100 : kBlock;  // some go inline
    std::memset(w.at_a(static_cast<size_t>(local[static_cast<size_t>(i)])),
                static_cast<int>(i % 251), kBlock);
  }
  const LeasePtr lease = w.grant(0, kCount * kBlock, 1);
  SubmitOptions options = under(lease);
  options.deadline_ns = deadline_after(30);
  options.has_arrival = true;
  const int64_t before = fake_verbs_count("work_requests");
  finish(w.a->submit(Op::kWrite, w.ra, w.remote,
                     SpanArguments{{local.data(), kCount, false},
                                   {into.data(), kCount, false},
                                   {nbytes.data(), kCount, false},
                                   {},
                                   false},
                     options));
  bool same = true;
  for (size_t i = 0; i < kCount; ++i)
    same &= std::memcmp(w.at_a(static_cast<size_t>(local[i])), w.at_b(static_cast<size_t>(into[i])),
                        static_cast<size_t>(nbytes[i])) == 0;
  CHECK(same);
  CHECK(lease->arrived(0));
  CHECK(w.pulled() == 0);
  // Four of five blocks are neighbours over there, and go in one request.
  CHECK(fake_verbs_count("work_requests") - before < kCount);
}

TEST_CASE("push: a write that is under way when its lease is revoked does not land") {
  PushWorld w;
  w.warm_up();
  const LeasePtr lease = w.grant(0, kBytes, 1);
  const uint64_t chains = w.writer()[0].chains_pushed;
  finish(w.write(lease, 4096, 0));  // the window is open
  REQUIRE(w.writer()[0].chains_pushed > chains);
  Held held({w.sink()});
  const int64_t posted = fake_verbs_count("doorbells");
  const TransferPtr t = w.write(lease, kBytes, 0, 0);
  REQUIRE(eventually([&] { return fake_verbs_count("doorbells") >= posted + 2; }));
  w.b->begin_revoke(lease);
  // The window is still open, and its writer has not drained.
  CHECK_FALSE(lease->gate.quiet());
  REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  std::memset(w.at_b(0), 0xEE, kBytes);  // reused at once
  held.release();
  finish(t, State::kFailed);
  CHECK(t->failure.code == Code::kLease);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  CHECK_FALSE(lease->arrived(0));
  CHECK(quiesces(t));
  CHECK(w.alive());
  const LeasePtr next = w.grant(0, kBytes);  // through fresh queue pairs
  finish(w.write(next));
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
  CHECK(w.explains("1 queue pair(s) of pushes replaced"));
}

TEST_CASE("push: a deaf writer goes on writing under a revoked lease, and nothing lands") {
  PushWorld w;
  w.warm_up();
  const LeasePtr lease = w.grant(0, kBytes);
  finish(w.write(lease, 4096));
  TransferPtr t;
  {
    Held deaf({w.control_of_a()});
    w.b->begin_revoke(lease);
    REQUIRE(eventually([&] { return lease->gate.quiet(); }));
    std::memset(w.at_b(0), 0xEE, kBytes);
    const int64_t posted = fake_verbs_count("doorbells");
    t = w.write(lease);
    REQUIRE(eventually([&] { return fake_verbs_count("doorbells") >= posted + 2; }));
    ::poll(nullptr, 0, 50);
    CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  }
  finish(t, State::kFailed);
  CHECK(t->failure.code == Code::kLease);
  CHECK(all_equal(w.at_b(0), kBytes, 0xEE));
  finish(w.write(w.grant(0, kBytes)));
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
}

TEST_CASE("push: keys come again after 256 binds, and no window is bound again undrained") {
  PushWorld w;
  w.warm_up();
  for (int i = 0; i < 300; ++i) {
    const LeasePtr lease = w.grant(0, 4096);
    w.at_a(0)[0] = static_cast<std::byte>(i);
    finish(w.write(lease, 4096));
    CHECK(w.at_b(0)[0] == static_cast<std::byte>(i));
    w.revoke(lease);
  }
  const int64_t windows = fake_verbs_count("windows");
  CHECK(windows <= 2 * static_cast<int64_t>(w.owner().size()));  // the same ones all the time
  CHECK(w.explains("0 queue pair(s) of pushes replaced"));
  const auto spare = [&] { return fake_verbs_count("windows"); };
  const LeasePtr first = w.grant(0, 4096), second = w.grant(8192, 4096);
  finish(w.write(first, 4096));
  const int64_t before = spare(), binds = fake_verbs_count("binds");
  {
    Held deaf({w.control_of_a()});
    w.revoke(first);
    const TransferPtr t = w.write(second, 4096, 8192);
    REQUIRE(eventually([&] { return fake_verbs_count("binds") > binds; }));
    CHECK(spare() > before);  // a's old key is not known to be drained
    deaf.release();
    finish(t);
  }
  CHECK(w.at_b(8192)[0] == w.at_a(8192)[0]);
}

TEST_CASE("push: spans within the hull that are not the lease's are refused, and nothing lands") {
  PushWorld w;
  const int64_t offsets[] = {0, 8 * 4096}, nbytes[] = {4096, 4096};
  const LeasePtr lease = w.b->grant(w.rb, {offsets, 2, false}, {nbytes, 2, false}, 60, {}, 0);
  finish(w.write(lease, 4096));
  const uint64_t pushed = w.pushed();
  const TransferPtr t = w.write(lease, 4096, 4 * 4096);
  finish(t, State::kFailed);
  CHECK(t->failure.code == Code::kLease);
  CHECK(w.pushed() == pushed);
  CHECK(all_equal(w.at_b(4096), 7 * 4096, 0));
  finish(w.write(lease, 4096, 8 * 4096));
  CHECK(w.pushed() > pushed);
}

TEST_CASE("push: what has no window is pulled, and explain() says why") {
  const auto pulls = [](PushWorld& w, const LeasePtr& lease, const std::string& reason) {
    finish(w.write(lease, 4096));
    CHECK(all_equal(w.at_b(0), 4096, 0x11));
    CHECK(w.pushed() == 0);
    CHECK(w.pulled() == 4096);
    CHECK(w.explains(reason));
  };
  SUBCASE("binding fails") {
    PushWorld w;
    const LeasePtr lease = w.grant(0, 4096);
    {
      Plan plan("bind=1");
      pulls(w, lease, "memory window bind error");
    }
    finish(w.write(w.grant(0, 8192), 8192));  // the next lease's does not
    CHECK(w.pushed() == 8192);
  }
  SUBCASE("there is no window to be had") {
    PushWorld w;
    Plan plan("fail=alloc_mw@1:ENOMEM");
    if (w.owner().size() > 1) return;  // it would be had on the other rail
    pulls(w, w.grant(0, 4096), "ibv_alloc_mw(type 2)");
  }
  SUBCASE("there is no queue pair to be had") {
    PushWorld w;
    Plan plan("fail=create_qp@1:ENOMEM");
    if (w.owner().size() > 1) return;
    pulls(w, w.grant(0, 4096), "ibv_create_qp");
  }
  SUBCASE("the lease lies in several pieces") {
    PushWorld w;
    const auto pieces = w.b->allocate(8192, {.name = "first"});
    std::vector<Piece> two{{pieces->pieces[0].base, 0, 4096}, {w.at_b(1 << 20), 0, 4096}};
    const RegionPtr region = w.b->register_pieces(two, true, nullptr, {.name = "two"});
    REQUIRE(eventually([&] { return w.a->regions_of(*w.to_b).contains("two"); }));
    const int64_t at = 0, nbytes = 8192;
    const LeasePtr lease = w.b->grant(region, {&at, 1, true}, {&nbytes, 1, true}, 60, {}, 0);
    SubmitOptions options = under(lease);
    options.deadline_ns = deadline_after(30);
    finish(w.a->submit(Op::kWrite, w.ra, w.a->regions_of(*w.to_b).at("two"),
                       SpanArguments{{&at, 1, true}, {&at, 1, true}, {&nbytes, 1, true}, {}, false},
                       options));
    CHECK(w.pushed() == 0);
    CHECK(w.explains("several pieces of memory"));
  }
}

TEST_CASE("push: an owner that was not told to pushes nothing in either direction") {
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "b";
  const auto b = Engine::create(options);
  options.name = "a";
  options.transport.verbs_push = true;
  const auto a = Engine::create(options);
  const RegionPtr source = a->allocate(4096, {.name = "kv"}),
                  target = b->allocate(4096, {.name = "kv"});
  const PeerPtr peer = a->connect(b->address(), 10);
  const int64_t at = 0, nbytes = 4096;
  const LeasePtr lease = b->grant(target, {&at, 1, true}, {&nbytes, 1, true}, 60, {}, 0);
  SubmitOptions patient = under(lease);
  patient.deadline_ns = deadline_after(30);
  std::memset(source->pieces[0].base, 0x21, 4096);
  finish(a->submit(Op::kWrite, source, a->regions_of(*peer).at("kv"),
                   SpanArguments{{&at, 1, true}, {&at, 1, true}, {&nbytes, 1, true}, {}, false},
                   patient));
  CHECK(all_equal(target->pieces[0].base, 4096, 0x21));
  CHECK(a->explain(*peer).find("it gives no windows: the engine was made without") !=
        std::string::npos);
  a->close();
  b->close();
}

TEST_CASE(
    "push: an invalidation that fails ends in a fresh queue pair, and is quiet all the same") {
  PushWorld w;
  const LeasePtr lease = w.grant(0, kBytes);
  finish(w.write(lease));
  {
    Plan plan("invalidate=1");
    w.revoke(lease);
  }
  std::memset(w.at_b(0), 0xEE, kBytes);
  finish(w.write(w.grant(0, kBytes)));
  CHECK(all_equal(w.at_b(0), kBytes, 0x11));
  CHECK(w.alive());
}

TEST_CASE("push: a region that leaves closes its windows") {
  PushWorld w;
  const LeasePtr lease = w.grant(0, kBytes);
  finish(w.write(lease));
  w.b->deregister(w.rb);
  CHECK(eventually([&] { return w.rb->gate.quiet() && lease->gate.quiet(); }));
  finish(w.write(lease, 4096), State::kFailed);
  CHECK(w.alive());
}

TEST_CASE(
    "push: a chain that is told twice counts once, and the last one says how many there are") {
  using verbs::Arrived;
  using verbs::Immediate;
  const Immediate immediate{1023, 130, verbs::kMaxChains - 1, true};
  const Immediate same = Immediate::unpack(immediate.pack());
  CHECK(same.slot == 1023);
  CHECK(same.generation == 130 % Immediate::kGenerations);
  CHECK(same.chain == verbs::kMaxChains - 1);
  CHECK(same.last);
  Arrived arrived;
  arrived.begin(5);
  for (int i = 0; i < 3; ++i) arrived.add({0, 5, 70, true});
  CHECK(arrived.num == 1);
  CHECK(arrived.total == 71);
  for (uint32_t chain = 0; chain < 70; ++chain) {
    CHECK_FALSE(arrived.is_complete());
    CHECK_FALSE(arrived.has(chain));
    arrived.add({0, 5, chain, false});
    arrived.add({0, 5, chain, false});
    CHECK(arrived.has(chain));
  }
  CHECK(arrived.is_complete());
  arrived.begin(6);
  CHECK_FALSE(arrived.is_complete());
  CHECK_FALSE(arrived.has(70));
}
