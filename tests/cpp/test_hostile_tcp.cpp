// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// An authenticated tcp peer that breaks the protocol where the engine is the owner: it harms its
// own connection alone, and no byte changes that it was not granted.
#include "hostile_tcp.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;

namespace {

using World = HostileWorld;
constexpr size_t kControlAt = kHeadBytes, kFlagsAt = 84, kOpAt = 86, kFirstAt = 88;  // of a STRIPE
constexpr uint64_t kFar = ~uint64_t{0};

// What is said on a lane, and the protocol error that it must be answered with.
struct Breach {
  std::string what;
  Bytes said;
  const char* answer;
  bool lands = false;  // bytes that were granted come with it
  size_t lane = 1;
};

std::vector<Breach> breaches(const World& w) {
  const Bytes good = frame_of(w.said({{4096, 64}}));
  const Bytes read = frame_of(w.said({{4096, 64}}, {.op = Op::kRead}));
  const Bytes note = frame_of(w.said({}, {.op = Op::kNotify, .notify = "hello"}));
  const Bytes half = frame_of(w.said({{4096, 60}}, {.total = 100}));
  const Bytes pong = frame_of(Type::kPong);
  const auto control = [](const Bytes& bytes, Type type) { return encode_plain(type, bytes); };
  std::vector<Breach> out = {
      {"another magic", with(good, 0, 'k'), "bad frame head"},
      {"another version", with(good, 4, uint8_t{2}), "bad frame head"},
      {"what must be zero", with(good, 28, 1), "bad frame head"},
      {"control of 64 KiB and a byte", with(pong, 8, 65537), "bad frame head", false, 0},
      {"control of 4 GiB", with(good, 8, ~0), "bad frame head"},
      {"a body of more than 16 MiB", with(good, 12, (16 << 20) + 1), "bad frame head"},
      {"a body of 4 GiB", with(good, 12, ~0), "bad frame head"},
      {"a body where none can be", with(pong, 12, 8), "unexpected body", false, 0},
      {"an unknown type", with(pong, 5, uint8_t{99}), "unknown frame type 99", false, 0},
      {"a HELLO again", with(pong, 5, uint8_t{1}), "unknown frame type 1", false, 0},
      {"a JOIN again", with(pong, 5, uint8_t{3}), "unknown frame type 3", false, 0},
      {"a STRIPE with a byte of control too few", with(good, 8, 99), "malformed STRIPE"},
      {"a STRIPE with a byte of control too many", with(good, 8, 101), "malformed STRIPE"},
      {"a STRIPE without control", with(good, 8, 0), "malformed STRIPE"},
      {"an unknown flag", with(good, kControlAt + kFlagsAt, uint16_t{8}), "malformed STRIPE"},
      {"an unknown op", with(good, kControlAt + kOpAt, uint16_t{3}), "malformed STRIPE"},
      {"a STRIPE that reads", with(good, kControlAt + kOpAt, uint16_t{1}), "malformed STRIPE"},
      {"a notification with bytes", with(good, kControlAt + kOpAt, uint16_t{2}),
       "malformed STRIPE"},
      {"more descriptors than there are", with(good, kControlAt + 80, 2), "malformed STRIPE"},
      {"2^32 descriptors", with(good, kControlAt + 80, ~0), "malformed STRIPE"},
      {"a notification longer than the frame", with(good, kControlAt + 76, 1), "malformed STRIPE"},
      {"a notification of 4 GiB", with(good, kControlAt + 76, ~0), "malformed STRIPE"},
      {"an empty span", with(good, kControlAt + kFirstAt + 8, 0), "malformed STRIPE"},
      {"a body longer than its spans", with(good, 12, 65), "malformed STRIPE"},
      {"a body shorter than its spans", with(good, 12, 63), "malformed STRIPE"},
      {"a stripe of more than the total", frame_of(w.said({{4096, 64}}, {.total = 63})),
       "malformed STRIPE"},
      {"an empty stripe of a write", frame_of(w.said({}, {.total = 64})), "malformed STRIPE"},
      {"1001 descriptors", frame_of(w.said(std::vector<Target>(1001, {4096, 1}))),
       "malformed STRIPE"},
      {"a READ that writes", with(read, kControlAt + kOpAt, uint16_t{0}), "malformed READ", false,
       0},
      {"a READ of nothing", frame_of(w.said({}, {.op = Op::kRead})), "malformed READ", false, 0},
      {"a READ of more than a stripe",
       frame_of(w.said({{0, kStripeBytes}, {0, 1}}, {.op = Op::kRead})), "malformed READ", false,
       0},
      {"a READ that notifies", frame_of(w.said({{4096, 64}}, {.op = Op::kRead, .notify = "n"})),
       "malformed READ", false, 0},
      {"another total", half + frame_of(w.said({{4096, 40}}, {.total = 101})), "disagree", true},
      {"another op", half + note, "disagree", true},
      {"more bytes than the total", half + half, "more bytes than", true},
      {"two notifications",
       frame_of(w.said({{4096, 60}}, {.total = 100, .notify = "one"})) +
           frame_of(w.said({{4096, 40}}, {.total = 100, .notify = "two"})),
       "two notifications", true},
      {"an ABORT never sent", frame_of(w.said({{4096, 64}}, {.cancel_count = 1})),
       "names an ABORT"},
      {"an ABORT never sent, after one", encode_abort(9, 1) + with(good, 24, 2), "names an ABORT"},
      {"a first ABORT that is the second", encode_abort(9, 2), "ABORTs out of order"},
      {"a first ABORT that is none", encode_abort(9, 0), "ABORTs out of order"},
      {"an ABORT twice", encode_abort(9, 1) + encode_abort(9, 1), "ABORTs out of order"},
      {"an ABORT left out", encode_abort(9, 1) + encode_abort(9, 3), "ABORTs out of order"},
      {"another trailer", with(good, good.size() - 8, 'd'), "bad stripe trailer", true},
      {"an unknown code in the trailer", with(good, good.size() - 4, kMaxCode + 1),
       "bad stripe trailer", true},
      {"READ_DATA that nobody asked for", read_data(1, 0, 64), "nobody asked"},
      {"READ_DATA without a stripe", with(read_data(1, 0, 64), 8, 0), "malformed READ_DATA"},
      {"an ACK of 7 bytes", control(Bytes(7), Type::kAck), "malformed ACK", false, 0},
      {"a REFUSE of nothing", frame_of(Type::kRefuse), "malformed REFUSE", false, 0},
      {"a REFUSE without a reason", control(Bytes(27), Type::kRefuse), "malformed REFUSE", false,
       0},
      {"a CONTROL of nothing", frame_of(Type::kControl), "malformed control", false, 0},
      {"more credit than there is", control(encode(Credit{kNotifyWindow + 1}), Type::kControl),
       "malformed control", false, 0},
  };
  for (const Type type : {Type::kRead, Type::kAck, Type::kRefuse, Type::kControl, Type::kBye,
                          Type::kError, Type::kPing, Type::kPong, Type::kReady, Type{99}})
    out.push_back({"a frame of lane 0 on another", with(frame_of(type), 6, kMaySkip),
                   "control frame on a bulk lane"});
  return out;
}

// A request that is refused: the reason, and what of it may have landed before.
struct Refused {
  std::string what;
  Said said;
  Code code;
};

}  // namespace

TEST_CASE("whoever breaks the protocol is told so and loses its own connection") {
  World world;
  for (const Breach& breach : breaches(world)) {
    INFO(breach.what);
    const auto peer = world.enter();
    peer->say(breach.lane, breach.said);
    const std::string cause = world.end_of(*peer);
    INFO(cause);
    CHECK(cause.starts_with("protocol error: "));
    CHECK(cause.find(breach.answer) != std::string::npos);
    world.check_memory(breach.lands);
    world.check_honest();
  }
  CHECK(world.engine->notifications().empty());
  CHECK(world.lease->num_arrived == 0);
}

TEST_CASE("a span that was not granted is refused, and not a byte of its stripe lands") {
  World world;
  const auto said = [&](std::vector<Target> targets, Said rest = {}) {
    return world.said(std::move(targets), std::move(rest));
  };
  Said no_lease = said({{4096, 64}}), other_key = no_lease, unknown_lease = no_lease,
       other_region = no_lease, unknown_region = no_lease, not_its_key = no_lease,
       not_writable = no_lease;
  no_lease.lease = {};
  other_key.lease.key[3] ^= std::byte{1};
  unknown_lease.lease.id = 77;
  other_region.region = not_writable.region = {world.read_only->id, world.read_only->key};
  unknown_region.region.id = 77;
  not_its_key.region.key[0] ^= std::byte{1};
  not_writable.lease = {};
  const std::vector<Refused> all = {
      {"before the lease", said({{4095, 64}}), Code::kLease},
      {"behind the lease", said({{8191, 2}}), Code::kLease},
      {"from one span of the lease into the next", said({{8000, 8400}}), Code::kLease},
      {"all of the region", said({{0, World::kBytes}}), Code::kLease},
      {"the second span of a stripe", said({{4096, 64}, {8192, 64}}), Code::kLease},
      {"beyond the region", said({{World::kBytes, 1}}), Code::kRemoteAccess},
      {"across the end of the region", said({{World::kBytes - 1, 2}}), Code::kRemoteAccess},
      {"an offset of 2^64 - 1", said({{kFar, 64}}), Code::kRemoteAccess},
      {"an end of 2^64 and more", said({{kFar - 63, 4096 + 128}}), Code::kRemoteAccess},
      {"an offset that is negative", said({{kFar - 4095, 64}}), Code::kRemoteAccess},
      {"without a lease", no_lease, Code::kLease},
      {"the lease's key is another", other_key, Code::kLease},
      {"an unknown lease", unknown_lease, Code::kLease},
      {"a lease of another region", other_region, Code::kLease},
      {"an unknown region", unknown_region, Code::kRemoteAccess},
      {"the region's key is another", not_its_key, Code::kRemoteAccess},
      {"a region that is read-only", not_writable, Code::kRemoteAccess},
      {"an arrival that the lease has not", said({{4096, 64}}, {.arrival = World::kNumArrivals}),
       Code::kLease},
  };
  const auto peer = world.enter();
  uint64_t request = 100;
  for (const Refused& each : all) {
    INFO(each.what);
    for (const Op op : {Op::kWrite, Op::kRead}) {
      if (op == Op::kRead && each.said.region.id == world.read_only->id) continue;
      Said now = each.said;
      now.op = op, now.request = ++request;
      if (op == Op::kWrite) now.notify = "seen";
      REQUIRE(peer->say(op == Op::kRead ? 0 : 1 + request % 2, frame_of(now)));
      const auto refusal = peer->hear(0, Type::kRefuse);
      REQUIRE(refusal);
      CHECK(refusal->head.request == request);
      CHECK(decode_failure(refusal->control)->code == each.code);
      if (op == Op::kRead) {
        const auto data = peer->hear(0, Type::kReadData);
        REQUIRE(data);
        CHECK(data->body.empty());
      }
      // The same again, and the rest: it drains, and the verdict stays the one.
      if (op == Op::kWrite)
        REQUIRE(peer->say(2 - request % 2, frame_of([&] {
                            Said again = now;
                            again.notify.reset();
                            return again;
                          }())));
    }
  }
  CHECK(peer->answered());
  world.leave(*peer);
  world.check_memory(false);
  CHECK(world.engine->notifications().empty());
  CHECK(world.lease->num_arrived == 0);
  world.check_honest();
}

TEST_CASE("a request that goes wrong later has landed within its lease, and is not accepted") {
  World world;
  const std::vector<std::pair<Code, Bytes>> all = {
      {Code::kLease, frame_of(world.said({{8000, 400}}, {.total = 464}))},
      {Code::kRemoteAccess, frame_of(world.said({{kFar, 400}}, {.total = 464}))},
      {Code::kCancelled,
       frame_of(world.said({{4160, 400}}, {.total = 464, .trailer = Code::kLease}))},
      {Code::kLease, frame_of(world.said({{4160, 400}}, {.total = 464, .arrival = kFar}))},
  };
  for (const auto& [code, last] : all) {
    const auto peer = world.enter();
    peer->say(1, frame_of(world.said({{4096, 64}}, {.total = 464, .arrival = 1, .notify = "n"})));
    peer->say(1, last);
    const auto refusal = peer->hear(0, Type::kRefuse);
    REQUIRE(refusal);
    CHECK(decode_failure(refusal->control)->code == code);
    CHECK(peer->answered());
    world.leave(*peer);
    world.check_memory(true);
  }
  CHECK(world.engine->notifications().empty());
  CHECK(world.lease->num_arrived == 0);
}

TEST_CASE("what is only odd is borne") {
  World world;
  const auto peer = world.enter();
  const uint64_t ids[] = {1, 2, kFar};
  peer->say(0, with(encode_plain(Type{99}, Bytes(1000)), 6, kMaySkip));
  peer->say(0, with(encode_plain(Type::kHello, Bytes(kMaxControlBytes)), 6, kMaySkip));
  peer->say(0, frame_of(Type::kPong) + frame_of(Type::kReady) + encode_acks(ids));
  peer->say(0, encode_failure(Type::kRefuse, 5, {.code = Code::kLease, .text = "\x1b[2J"}));
  CHECK(peer->answered());
  // ABORT of what never was; a retry that names it waits until every lane has seen it.
  const Bytes abort = encode_abort(9, 1);
  peer->say(1, abort);
  peer->say(1,
            frame_of(world.said({{4096, 64}}, {.request = 10, .arrival = 0, .cancel_count = 1})));
  peer->say(0, abort);
  CHECK(peer->answered());
  CHECK_FALSE(world.lease->arrived(0));
  peer->say(2, abort);
  CHECK(peer->hear(0, Type::kAck));
  CHECK(world.lease->arrived(0));
  // A stripe twice instead of two: they are its own bytes, where it may write them.
  const Bytes half = frame_of(world.said({{4096, 50}}, {.request = 11, .total = 100}));
  peer->say(1, half);
  peer->say(2, half);
  CHECK(peer->hear(0, Type::kAck));
  CHECK(peer->answered());
  world.leave(*peer);
  world.check_memory(true);
}

TEST_CASE("an empty request is accepted once, whatever lanes its stripes come by") {
  World world;
  const Bytes note = frame_of(world.said({}, {.op = Op::kNotify, .notify = "once"}));
  const Bytes bare = frame_of(world.said({}, {.op = Op::kNotify}));
  int num_ended = 0;
  for (int round = 0; round < 50 && num_ended == 0; ++round) {
    const auto peer = world.enter();
    peer->say(1, ByteView(note).first(note.size() - kTrailerBytes));
    CHECK(peer->answered());
    peer->say(2, bare);
    // Lane 1 may not have been read yet: then these are two requests, one after the other.
    num_ended += !peer->hear(0, Type::kAck);
    peer->say(1, ByteView(note).last(kTrailerBytes));
    if (num_ended == 0)
      CHECK(peer->hear(0, Type::kAck));
    else
      CHECK(world.end_of(*peer).find("a second stripe") != std::string::npos);
    CHECK(world.engine->notifications().size() <= 1);
  }
  CHECK(num_ended == 1);
}

TEST_CASE("half a frame, then silence or the end: nothing is accepted") {
  World world;
  const Bytes whole = frame_of(world.said({{4096, 64}}, {.arrival = 0, .notify = "whole"}));
  const size_t body = whole.size() - kTrailerBytes - 64;
  for (const size_t cut : {size_t{1}, kHeadBytes - 1, kHeadBytes, kHeadBytes + 50, body, body + 1,
                           body + 63, body + 64, whole.size() - 1}) {
    for (const size_t lane : {0, 1}) {
      INFO("lane ", lane, ", after ", cut, " bytes");
      const auto peer = world.enter();
      peer->say(lane, ByteView(whole).first(cut));
      if (lane != 0) CHECK(peer->answered());  // the silence is that lane's alone
      world.check_honest();
      CHECK(world.leave(*peer).find("end of stream") != std::string::npos);
      world.check_memory(cut > body);
    }
  }
  CHECK(world.engine->notifications().empty());
  CHECK(world.lease->num_arrived == 0);
}

TEST_CASE("silence in the middle of a stripe does not keep a lease from being quiet") {
  World world;
  const auto peer = world.enter();
  const Bytes whole = frame_of(world.said({{4096, 4096}}, {.arrival = 0}));
  peer->say(1, ByteView(whole).first(whole.size() - 2048));
  CHECK(eventually_within(10, [&] {  // what it has said has landed
    return has_landed(world.memory[World::kGuard + 4096 + 2000]);
  }));
  world.engine->begin_revoke(world.lease);
  REQUIRE(world.lease->gate.wait_quiet(deadline_after(10)) == Woken::kNotified);
  world.check_memory(true);
  peer->say(1, ByteView(whole).last(2048));
  const auto refusal = peer->hear(0, Type::kRefuse);
  REQUIRE(refusal);
  CHECK(decode_failure(refusal->control)->code == Code::kLease);
  world.leave(*peer);
  world.check_memory(false);
  CHECK(world.lease->num_arrived == 0);
}

TEST_CASE("what is kept for a peer has a bound") {
  // Each is said again and again, and nothing that the engine says is read.
  struct Flood {
    std::string what;
    size_t lane;
    const char* answer;
    std::function<Bytes(uint64_t)> said;
  };
  constexpr size_t kEnough = 64 << 20;  // far more than the sockets hold
  World world;
  const Said bad_read = world.said({{0, 1}}, {.op = Op::kRead});
  const std::string note(kMaxNotificationBytes - 1, 'n');
  const Flood floods[] = {
      {"requests that lack a byte", 1, "too many requests in flight",
       [&](uint64_t i) { return frame_of(world.said({{4096, 1}}, {.request = i, .total = 2})); }},
      {"messages of requests that lack a byte", 1, "more notifications",
       [&](uint64_t i) {
         return frame_of(world.said({{4096, 1}}, {.request = i, .total = 2, .notify = note}));
       }},
      {"ABORTs on one lane", 1, "too many aborts in flight",
       [](uint64_t i) { return encode_abort(i, static_cast<uint32_t>(i)); }},
      {"reads whose data is not read", 0, "too many reads in flight",
       [&](uint64_t i) {
         Said read{.targets = {{0, kStripeBytes}}, .request = i, .op = Op::kRead};
         read.region = {world.read_only->id, world.read_only->key};
         return frame_of(read);
       }},
      {"reads that are refused", 0, "answers",
       [&](uint64_t i) { return with(frame_of(bad_read), 16, i); }},
      {"PINGs", 0, "answers", [](uint64_t) { return frame_of(Type::kPing); }},
  };
  for (const Flood& flood : floods) {
    INFO(flood.what);
    const auto peer = world.enter();
    const int small = 4096;
    for (const Fd& lane : peer->lanes)
      ::setsockopt(lane.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    size_t sum = 0;
    for (uint64_t i = 1; sum < kEnough;) {
      Bytes burst;
      while (burst.size() < 32 * 1024) burst = std::move(burst) + flood.said(i++);
      sum += burst.size();
      if (!peer->say(flood.lane, burst)) break;
    }
    CHECK(sum < kEnough);
    const std::string cause = world.end_of(*peer);
    INFO(cause);
    CHECK(cause.starts_with("protocol error: "));
    CHECK(cause.find(flood.answer) != std::string::npos);
    world.check_memory(true);
    world.check_honest();
  }
  // Those that were accepted, and no more than the window allows.
  CHECK(world.engine->notifications().empty());
}

TEST_CASE("messages beyond the window are refused, not kept") {
  World world;
  const auto peer = world.enter();
  for (uint64_t i = 0; i < 3 * kNotifyWindow; ++i)
    peer->say(0, frame_of(world.said({}, {.request = i, .op = Op::kNotify, .notify = "n"})));
  CHECK(peer->answered());
  CHECK(world.engine->notifications().size() == 2 * kNotifyWindow);
  world.check_honest();
}
