// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer over shared memory that breaks the protocol, and reasons why there is no such peer. The
// oracle is the fuzz target's: no byte outside a lease changes, each request of ours has one end.
#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "fuzz/shm_peer.hpp"
#include "transport/shm/transport.hpp"

using namespace kvxfer;
using namespace kvxfer::shm;
using kvxfer::fuzz::kKey;
using kvxfer::fuzz::ShmHost;
using kvxfer::fuzz::ShmPeer;

namespace {

RequestHead notification(uint64_t lease) {
  return {.ticket = {0, 1},
          .op = static_cast<uint32_t>(Op::kNotify),
          .flags = kHasNotify,
          .region = {lease, kKey},
          .lease = {lease, kKey}};
}

}  // namespace

// It is admitted by its lease alone, which says nothing of writing: it once wrote to a region that
// its owner had registered read-only.
TEST_CASE("a notification under a lease that brings spans or bytes ends its connection") {
  const SpanRecord span{.source = 0, .target = 0, .nbytes = 64, .index = 0};
  for (const uint64_t lease : {ShmHost::kReadOnly, ShmHost::kShown}) {
    for (const int how : {0, 1, 2, 3}) {
      ShmHost host;
      {
        ShmPeer peer(host);
        RequestHead head = notification(lease);
        std::span<const SpanRecord> spans;
        if (how == 0)
          head.flags |= kInline, head.num_spans = 1, head.nbytes = 64, spans = {&span, 1};
        if (how == 1) head.nbytes = 64;  // its spans are to come
        if (how == 2) head.flags |= kMapped, head.source = 5;
        peer.side(1).slots[0].store(slot_word(1, Slot::kPosted));
        peer.message(Type::kRequest, {view_of(head), view_of(spans)});
        const PartHead part{head.ticket, 1};
        peer.bulk(Type::kCheck, {view_of(part), view_of(std::span(&span, 1))});
        peer.bulk(Type::kSpans, {view_of(part), view_of(std::span(&span, 1))});
        peer.bulk(Type::kStaged, {view_of(StageHead{head.ticket, 0, 64})});
        for (int i = 0; i < 4; ++i) peer.connection().poll();
        INFO("case ", how, ", lease ", lease);
        CHECK(host.is_lost() == (how != 3));  // that one is honest, and what follows finds nobody
        peer.leave();
      }
      host.check();
    }
  }
}

// The first one asks for its source over the socket, which ends the connection; the second one was
// accepted all the same, after the application had been told that the peer is lost.
TEST_CASE("what stands behind the message that a connection ends by is not accepted") {
  ShmHost host;
  {
    ShmPeer peer(host);
    const RequestHead second = notification(ShmHost::kShown);
    RequestHead first = second;
    first.ticket.slot = 1;
    first.op = static_cast<uint32_t>(Op::kWrite);
    first.flags = kMapped | kInline;
    first.region = {ShmHost::kShown, kKey};
    first.source = 5;
    for (const auto& head : {first, second})
      peer.side(1).slots[head.ticket.slot].store(slot_word(head.ticket.generation, Slot::kPosted));
    peer.message(Type::kRequest, {view_of(first)});
    peer.message(Type::kRequest, {view_of(second)});
    peer.bulk(Type::kStaged, {view_of(StageHead{second.ticket, 0, 64})});
    peer.announce(99, 5, 64, {}, {});
    peer.connection().poll();
    CHECK(host.is_lost());
    CHECK(peer.side(1).slots[0].load() == slot_word(second.ticket.generation, Slot::kPosted));
    peer.leave();
  }
  host.check();
}

TEST_CASE("an honest notification under a lease is accepted") {
  ShmHost host;
  {
    ShmPeer peer(host);
    peer.side(1).slots[0].store(slot_word(1, Slot::kPosted));
    peer.message(Type::kRequest, {view_of(notification(ShmHost::kReadOnly))});
    peer.connection().poll();
    CHECK_FALSE(host.is_lost());
    CHECK(peer.side(1).slots[0].load() == slot_word(1, Slot::kAccepted));
    peer.leave();
  }
  host.check();
}

TEST_CASE("a ring of nothing but skips is broken, and does not keep its reader") {
  alignas(8) static std::byte data[1024];
  RingHead head{};
  RingConsumer consumer;
  consumer.attach(&head, data, sizeof data);
  const RecordHead skip{kSkip, 0};
  std::memcpy(data, &skip, sizeof skip);
  head.tail.store(sizeof data);
  uint32_t type = 0;
  Bytes body;
  CHECK(consumer.peek(type, body) == Pop::kBroken);  // each would have been followed by another
}

TEST_CASE("whatever a peer scribbles while we read and copy, it harms its own connection alone") {
  std::minstd_rand random(3);
  for (int round = 0; round < 60; ++round) {
    ShmHost host;
    {
      const Segment control = make_shared("kvxfer-test-control", sizeof(Control));
      std::string reason;
      const auto view = map_peer_shared(control.fd.get(), sizeof(Control), reason);
      REQUIRE_MESSAGE(view, reason);
      ShmPeer peer(host, control.mapping);
      std::atomic<bool> stop{false};
      // Through a mapping of its own, as another process would.
      std::thread scribbler([&, seed = random()] {
        std::minstd_rand dice(seed);
        Control& shared = *reinterpret_cast<Control*>(view->data());
        while (!stop.load(std::memory_order_relaxed)) {
          Side& side = shared.side[dice() % 2];
          const uint64_t value = dice();
          switch (dice() % (round % 2 == 0 ? 5 : 8)) {  // positions only in every other round
            case 0:
            case 1:
              std::memcpy(side.message_data + dice() % 4096 / 8 * 8, &value, sizeof value);
              break;
            case 2:
              std::memcpy(side.bulk_data + dice() % 4096 / 8 * 8, &value, sizeof value);
              break;
            case 3:
              side.slots[dice() % 8].store(slot_word(1, static_cast<Slot>(dice() % 5)));
              break;
            case 4:
              side.messages.sleeping.store(dice() % 2), side.bulk.starving.store(dice() % 2);
              break;
            case 5:
              side.messages.tail.fetch_add(dice() % 64 * 8);
              break;
            case 6:
              side.bulk.tail.fetch_add(dice() % 64 * 8);
              break;
            default:
              side.stage_head.fetch_add(dice() % 3);
          }
        }
      });
      for (uint32_t i = 0; i < 200 && !host.is_lost(); ++i) {
        const SpanRecord span{.source = 0, .target = i * 8, .nbytes = 64, .index = 0};
        const RequestHead head{.ticket = {i % 8, 1},
                               .op = i % 2,
                               .flags = kInline,
                               .num_spans = 1,
                               .nbytes = 64,
                               .region = {ShmHost::kSplit, kKey},
                               .lease = {ShmHost::kSplit, kKey}};
        peer.message(Type::kRequest, {view_of(head), view_of(std::span(&span, 1))});
        peer.bulk(Type::kStaged, {view_of(StageHead{head.ticket, i % kNumStageSlots, 64})});
        if (i % 16 == 0)
          if (const auto request = host.next(i % 32 == 0 ? Op::kRead : Op::kWrite, false, 3, 64, 0))
            host.post(peer.connection(), request);
        peer.connection().poll();
        peer.hear();
      }
      stop.store(true);
      scribbler.join();
      peer.leave();
    }
    host.check();
  }
}

TEST_CASE("each reason why a peer cannot be reached by shared memory is named") {
  ShmHost host;
  host.who.host.boot_id = "this boot";
  host.who.host.uid = ::getuid();
  ShmTransport transport({});
  REQUIRE_FALSE(transport.probe());
  transport.start(host);
  const auto refused = [&](uint32_t version, const std::string& boot_id, const std::string& name) {
    Bytes offer;
    Writer writer(offer);
    writer.u32(version), writer.text(boot_id), writer.text(name);
    return transport.attach({}, offer, Patience(deadline_after(1))).value_or("accepted");
  };
  const auto says = [](const std::string& text, const char* what) {
    INFO(text);
    CHECK(text.find(what) != std::string::npos);
  };
  says(refused(kVersion + 1, "this boot", "x"), "we speak 2");
  says(refused(kVersion, "another boot", "x"), "another machine");
  says(refused(kVersion, "this boot", "kvxfer-nobody"), "another network namespace?");
  const Bytes offer = transport.offer();
  Reader own(offer);
  own.u32(), own.text(128);
  const std::string socket = own.text(96);
  host.who.host.uid = ::getuid() + 1;
  says(refused(kVersion, "this boot", socket), "processes of one user");
  transport.stop();
}

TEST_CASE("a join that nobody answers is given up when nobody wants it any more") {
  ShmHost host;
  host.who.host.boot_id = "this boot";
  host.who.host.uid = ::getuid();
  ShmTransport transport({}), mute({});
  transport.start(host);
  mute.start(host);  // its socket is there, and no reactor runs that would take from it
  int looks = 0;
  const Patience patience(deadline_after(60), [&] { return ++looks > 3; });
  const int64_t begun_ns = now_ns();
  try {
    transport.attach({}, mute.offer(), patience);
    FAIL("it was answered");
  } catch (const Error& error) {
    CHECK(error.code == Code::kCancelled);
  }
  CHECK(looks == 4);
  CHECK(now_ns() - begun_ns < 2'000'000'000);
  transport.stop();
  mute.stop();
}
