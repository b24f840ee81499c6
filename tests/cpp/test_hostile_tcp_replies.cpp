// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// An authenticated tcp peer that lies about the engine's own requests: each has one end all the
// same, and their memory is neither written nor read after it.
#include "hostile_tcp.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;

namespace {

using World = HostileWorld;

// The engine's region of its own requests: bytes of `value` in the range, untouched elsewhere.
void check_own(World& w, size_t begin, size_t end, std::byte value) {
  const auto same = [&](size_t from, size_t to, std::byte v) {
    return from == to || all_equal(w.own.data() + from, to - from, static_cast<int>(v));
  };
  CHECK(same(0, World::kGuard + begin, kUntouched));
  CHECK(same(World::kGuard + begin, World::kGuard + end, value));
  CHECK(same(World::kGuard + end, w.own.size(), kUntouched));
}
void wipe_own(World& w) { std::memset(w.own.data(), static_cast<int>(kUntouched), w.own.size()); }
State end_of(const TransferPtr& transfer) {
  REQUIRE(transfer->wait(deadline_after(30)) == Woken::kNotified);
  return transfer->state.load();
}

struct Lie {
  std::string what;
  std::function<Bytes(uint64_t id)> said;  // to a read of 4096 bytes
  const char* answer;                      // the protocol error; null: the read alone fails
  size_t lane = 1;
};

}  // namespace

TEST_CASE("lies about a read of ours end it once, and write nothing but its destination") {
  World world;
  const Lie lies[] = {
      {"of more bytes than asked for", [](uint64_t id) { return read_data(id, 0, 4097); },
       "wrong length"},
      {"of fewer", [](uint64_t id) { return read_data(id, 0, 4095); }, "wrong length"},
      {"of another stripe", [](uint64_t id) { return read_data(id, 1, 4096); }, "nobody asked"},
      {"of stripe 2^32 - 1", [](uint64_t id) { return read_data(id, ~0u, 4096); }, "nobody asked"},
      {"with an unknown trailer",
       [](uint64_t id) { return with(read_data(id, 0, 4096), kHeadBytes + 4 + 4096 + 4, 99); },
       "bad stripe trailer"},
      {"that it was written", [](uint64_t id) { return encode_acks({{id}}); },
       "ACK of a request that was not sent", 0},
      {"twice", [](uint64_t id) { return read_data(id, 0, 4096) + read_data(id, 0, 4096); },
       "nobody asked"},
      {"padding, by its trailer", [](uint64_t id) { return read_data(id, 0, 4096, Code::kLease); },
       nullptr},
      {"nothing", [](uint64_t id) { return read_data(id, 0, 0); }, nullptr},
      {"a refusal, of a span that it has not",
       [](uint64_t id) {
         return encode_failure(Type::kRefuse, id,
                               {.code = Code::kLease, .span = 1u << 31, .text = "no"});
       },
       nullptr, 0},
  };
  for (const Lie& lie : lies) {
    INFO(lie.what);
    const auto peer = world.enter();
    const TransferPtr read = world.submit(Op::kRead, *peer, 8192, 4096);
    REQUIRE(peer->hear(0, Type::kRead));
    peer->say(lie.lane, lie.said(read->id));
    const State state = end_of(read);
    CHECK((state == State::kFailed || lie.what == "twice"));
    if (lie.answer == nullptr) {
      CHECK(peer->answered());
      // What comes now is nobody's.
      wipe_own(world);
      peer->say(2, read_data(read->id, 0, 4096));
      peer->say(0,
                encode_acks({{read->id}}) +
                    encode_failure(Type::kRefuse, read->id, {.code = Code::kLease, .text = "no"}));
      if (peer->answered()) world.leave(*peer);
      check_own(world, 0, 0, kUntouched);
    }
    const std::string cause = world.end_of(*peer);
    INFO(cause);
    if (lie.answer != nullptr) {
      CHECK(cause.starts_with("protocol error: "));
      CHECK(cause.find(lie.answer) != std::string::npos);
    }
    std::memset(world.own.data() + World::kGuard + 8192, static_cast<int>(kUntouched), 4096);
    check_own(world, 0, 0, kUntouched);
    world.check_honest();
  }
  world.check_ends();
}

TEST_CASE("what comes for a read that was cancelled in the middle lands nowhere") {
  World world;
  for (const bool in_the_middle : {false, true}) {
    const auto peer = world.enter();
    const TransferPtr read = world.submit(Op::kRead, *peer, 4096, 4096);
    REQUIRE(peer->hear(0, Type::kRead));
    const Bytes data = read_data(read->id, 0, 4096);
    const size_t first = in_the_middle ? data.size() - 2048 : 0;
    peer->say(1, ByteView(data).first(first));
    if (in_the_middle)
      CHECK(eventually_within(10,
                              [&] { return has_landed(world.own[World::kGuard + 4096 + 2000]); }));
    world.engine->cancel(read);
    REQUIRE(eventually_within(10, [&] { return read->quiesced.load(); }));
    CHECK(read->state == State::kCancelled);
    wipe_own(world);
    peer->say(1, ByteView(data).subspan(first));
    // A further read by the same lane: all of the other has been taken by its end.
    const TransferPtr next = world.submit(Op::kRead, *peer, 16384, 64);
    REQUIRE(peer->hear(0, Type::kRead));
    peer->say(1, read_data(next->id, 0, 64));
    CHECK(end_of(next) == State::kDone);
    check_own(world, 16384, 16384 + 64, kTheirs);
    wipe_own(world);
    world.leave(*peer);
  }
  world.check_ends();
}

TEST_CASE("half an answer, then the end: the read fails, once") {
  World world;
  const auto peer = world.enter();
  const TransferPtr read = world.submit(Op::kRead, *peer, 4096, 4096);
  REQUIRE(peer->hear(0, Type::kRead));
  const Bytes data = read_data(read->id, 0, 4096);
  peer->say(1, ByteView(data).first(data.size() - 1));
  CHECK(world.leave(*peer).find("end of stream") != std::string::npos);
  CHECK(end_of(read) == State::kFailed);
  CHECK(read->failure.code == Code::kPeerDisconnected);
  world.check_ends();
}

// An ACK of what was being sent once ended the write, and its memory, the caller's again, went on
// being read into the socket.
TEST_CASE("a write is done only when all of it has left, whatever is acknowledged") {
  constexpr int64_t kEach = 1 << 20;
  World world(1);
  const auto peer = world.enter();
  const int small = 64 * 1024;
  ::setsockopt(peer->lanes[1].get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  std::vector<TransferPtr> writes;
  for (int i = 0; i < 32; ++i) writes.push_back(world.submit(Op::kWrite, *peer, 0, kEach));
  // What its socket takes is on its way, and it stands in the middle of one.
  CHECK(peer->answered());
  for (const TransferPtr& each : writes) peer->say(0, encode_acks({{each->id}}));
  const std::string cause = world.end_of(*peer);
  INFO(cause);
  CHECK(cause.find("ACK of a request that was not sent") != std::string::npos);
  size_t num_done = 0;
  for (const TransferPtr& each : writes) num_done += end_of(each) == State::kDone;
  const size_t whole = peer->drain(1) / (kHeadBytes + 100 + kEach + kTrailerBytes);
  CHECK(num_done <= whole);
  CHECK(num_done < writes.size());
  world.check_ends();
}

TEST_CASE("a refusal of what is being sent ends the write, and its memory is not read any more") {
  World world(1);
  const auto peer = world.enter();
  const TransferPtr write = world.submit(Op::kWrite, *peer, 0, World::kBig);
  CHECK(peer->answered());
  peer->say(0, encode_failure(Type::kRefuse, write->id, {.code = Code::kLease, .text = "no"}));
  CHECK(end_of(write) == State::kFailed);
  REQUIRE(write->quiesced);
  std::memset(world.own.data(), 0x77, world.own.size());  // the caller's again
  const auto count = [](const std::optional<HeardFrame>& frame) {
    return frame ? std::ranges::count(frame->body, std::byte{0x77}) : -1;
  };
  // ABORT comes behind whatever had begun; none of that is of the memory as it is now.
  for (bool aborted = false; !aborted;) {
    const auto frame = peer->hear(1);
    REQUIRE(frame);
    aborted = frame->head.type == Type::kAbort;
    CHECK(count(frame) == 0);
  }
  CHECK(peer->answered());
  world.check_ends();
}
