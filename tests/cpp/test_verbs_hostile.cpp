// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer that is let in and then breaks the protocol: it changes no byte beyond the spans of a
// request, ends none of ours that our NIC is at work for, and costs its own connection alone.
//
// The engine that breaks it, b, is an honest one whose messages are rewritten as they are posted.
#include <atomic>
#include <cstring>
#include <vector>

#include "verbs_push_world.hpp"
#include "verbs_tamper.hpp"

using namespace kvxfer;
using verbs::Channel;
using verbs::DataHead;
using verbs::Type;
using namespace kvxfer::tamper;

namespace {

Message outcome(Ticket ticket, uint64_t nbytes) {
  const OutcomeHead head{ticket, 0, 0, nbytes, kNoSpan, 0, 0};
  return made(Type::kOutcome, {view_of(head)});
}
Message read_data(Ticket ticket, const Bytes& bytes) {
  const DataHead head{ticket, static_cast<uint32_t>(bytes.size()), 0};
  return made(Type::kReadData, {view_of(head), ByteView(bytes)});
}

SubmitOptions an_empty_one() {
  SubmitOptions options;
  options.deadline_ns = deadline_after(30);
  options.has_notify = true;
  return options;
}

// What is held is not given up meanwhile.
TransportConfig patient() {
  TransportConfig config = pushing();
  config.deadline_ns = 60'000'000'000;
  return config;
}

struct World : PushWorld {
  explicit World(const TransportConfig& config = pushing()) : PushWorld(1 << 24, config) {
    std::memset(at_a(0), 0, static_cast<size_t>(ra->nbytes));
    std::memset(at_b(0), 0x22, static_cast<size_t>(rb->nbytes));
  }
  TransferPtr read(int64_t nbytes = kBytes) { return move(Op::kRead, 0, 0, nbytes); }
  uint32_t source_of_b() const { return of(to_a).ends().rails[0].source.number; }

  // We have noticed, and it was told as what it is.
  void check_thrown_out(const TransferPtr& t) const {
    finish(t, State::kFailed);
    CHECK(quiesces(t));
    CHECK(eventually([&] { return !to_b->alive.load(); }));
    INFO(t->message);
    CHECK(t->message.find("broke the verbs protocol") != std::string::npos);
  }
  // Another connection works as if nothing had been.
  void check_works_again() {
    to_b = a->connect(b->address(), 10);
    remote = a->regions_of(*to_b).at("kv");
    finish(read());
    CHECK(all_equal(at_a(0), kBytes, 0x22));
  }
};

}  // namespace

TEST_CASE("a grant for a read that has had bytes in messages") {
  World w;
  constexpr int64_t kSpan = 64, kStep = 8192;
  std::vector<int64_t> local, from;
  for (int64_t i = 0; i < 3; ++i) local.push_back(i * kStep), from.push_back(i * kSpan);
  SubmitOptions options;
  options.deadline_ns = deadline_after(30);
  TransferPtr t;
  {
    const Tamper tamper(Type::kGranted, [](const Message& message) {
      return std::vector{read_data(message.ticket(), Bytes(kSpan, std::byte{0xee})), message};
    });
    const SpanArguments spans{
        {local.data(), 3, false}, {from.data(), 3, false}, {&kSpan, 1, true}, {}, false};
    t = w.a->submit(Op::kRead, w.ra, w.remote, spans, std::move(options));
    w.check_thrown_out(t);
    CHECK(tamper.num() == 1);
  }
  for (int64_t i = 0; i < 3; ++i) std::memset(w.at_a(static_cast<size_t>(i * kStep)), 0, kSpan);
  CHECK(all_equal(w.at_a(0), w.ra->nbytes, 0));
  w.check_works_again();
}

TEST_CASE("bytes in messages for a read that has been granted") {
  World w;
  const Tamper tamper(Type::kGranted, [](const Message& message) {
    return std::vector{message, read_data(message.ticket(), Bytes(64, std::byte{0xee}))};
  });
  w.check_thrown_out(w.read());
  CHECK(tamper.num() == 1);
}

TEST_CASE("the end of a read is told while our NIC reads the words") {
  World w(patient());
  std::atomic<bool> granted{false};
  Ticket ticket;
  TransferPtr t;
  const Held held({w.source_of_b()});  // what our NIC asks for
  {
    const Tamper tamper(Type::kGranted, [&](const Message& message) {
      ticket = message.ticket();
      granted = true;
      return std::vector{message};
    });
    t = w.read(64);
    REQUIRE(eventually([&] { return granted.load(); }));
  }
  REQUIRE(eventually([&] { return fake_verbs_num_held(held.numbers[0]) > 0; }));
  fake_verbs_pass(held.numbers[0], 1);  // the data; the words, which follow, are held
  REQUIRE(eventually([&] { return fake_verbs_num_held(held.numbers[0]) > 0; }));
  const Tamper tamper(Type::kRequest,
                      [&](const Message&) { return std::vector{outcome(ticket, 64)}; });
  const TransferPtr notification = w.b->notify(w.to_a, an_empty_one());
  REQUIRE(eventually([] { return Tamper::num() == 1; }));
  CHECK(eventually([&] { return !w.to_b->alive.load(); }));
  held.release();
  w.check_thrown_out(t);
  REQUIRE(notification->wait(deadline_after(30)) == Woken::kNotified);
}

TEST_CASE("a read that was cancelled is told to have ended well, while our NIC still reads") {
  World w;
  Held held({w.source_of_b()});
  const Tamper tamper(Type::kOutcome, [](const Message& message) {
    return std::vector{outcome(message.ticket(), kBytes)};
  });
  const TransferPtr t = w.read();
  REQUIRE(eventually([&] { return fake_verbs_num_held(held.numbers[0]) > 0; }));
  w.a->cancel(t);
  finish(t, State::kCancelled);
  // One that goes by messages alone, behind the outcome.
  const TransferPtr said = w.a->notify(w.to_b, an_empty_one());
  finish(said);
  held.release();
  CHECK(quiesces(t));
  finish(w.read());
  CHECK(all_equal(w.at_a(0), kBytes, 0x22));
}

TEST_CASE("a read that was cancelled, after its owner has taken the source away for good") {
  World w(patient());
  const Held held({w.source_of_b()});
  const TransferPtr t = w.read();
  REQUIRE(eventually([&] { return fake_verbs_num_held(held.numbers[0]) > 0; }));
  // What asks for another one is lost.
  const Tamper tamper(Type::kPullBroken,
                      [](const Message&) { return std::vector{made(Type::kCredit, {})}; });
  REQUIRE(fake_verbs_break_qp(w.writer()[0].puller) == 0);
  REQUIRE(eventually([] { return Tamper::num() > 0; }));
  w.a->cancel(t);
  finish(t, State::kCancelled);
  CHECK(quiesces(t));
}

TEST_CASE("the end of a write that the owner was never told of") {
  World w;
  // The first of this connection: slot 0, generation 1.
  const Tamper tamper(Type::kWindow, [](const Message& message) {
    return std::vector{outcome({0, 1}, kBytes), message};
  });
  const LeasePtr lease = w.grant(0, kBytes);
  w.check_thrown_out(w.write(lease));
  CHECK(tamper.num() == 1);
  CHECK(all_equal(w.at_b(0), kBytes, 0x22));
}

TEST_CASE("a part of a write that the owner was never told of") {
  for (const Type type : {Type::kMore, Type::kUseMessages}) {
    World w;
    const Tamper tamper(Type::kWindow, [&](const Message& message) {
      return std::vector{made(type, {view_of(PartHead{{0, 1}, 0})}), message};
    });
    const LeasePtr lease = w.grant(0, kBytes);
    w.check_thrown_out(w.write(lease));
    CHECK(tamper.num() == 1);
  }
}

TEST_CASE("what a peer does not take is queued up to a limit") {
  std::string reason;
  const auto takes_all = [](const verbs::Device&) { return std::string(); };
  const verbs::Devices devices = verbs::Device::open_all({}, takes_all, reason);
  REQUIRE(!devices.empty());
  std::vector<ibv_cq*> queues;
  for (const auto& device : devices)
    queues.push_back(ibv_create_cq(device->context(), 16, nullptr, nullptr, 0));
  {
    Channel channel(devices, queues);
    const uint64_t lease = 7;
    for (size_t i = 0; i < Channel::kMaxQueued; ++i)
      channel.message(Type::kDrained, {view_of(lease)});
    CHECK_FALSE(channel.is_overrun());
    channel.message(Type::kDrained, {view_of(lease)});
    CHECK(channel.is_overrun());
  }
  for (ibv_cq* queue : queues) ibv_destroy_cq(queue);
}
