// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A tcp peer without sockets, the fuzz target's: what has to happen between two looks of the engine
// does, each time.
#include <doctest/doctest.h>

#include "fuzz/tcp_peer.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;
using fuzz::kKey;
using fuzz::TcpHost;
using fuzz::TcpPeer;

// Through sockets a turn of the engine answers dozens of requests at once, and what shows the bound
// is a flood of 70 MB.
TEST_CASE("acknowledgements that nobody reads have a bound, and the reason is named") {
  TcpHost host;
  {
    TcpPeer peer(host, 2);
    const StripeHead nothing{
        .access = {Op::kWrite, {TcpHost::kShown, kKey}, {TcpHost::kShown, kKey}, {}},
        .targets = {},
        .notify = {}};
    uint64_t num_said = 0;
    const auto say = [&] {
      Bytes frame = encode_stripe({.type = Type::kStripe, .request = ++num_said}, nothing, {});
      frame.resize(frame.size() + kTrailerBytes);
      write_trailer(Code::kOk, frame.data() + frame.size() - kTrailerBytes);
      peer.say(1, frame);
      peer.work();
    };
    say();
    CHECK(peer.connection().counters.requests_served.load() == 1);
    peer.lane(0).room = 0;
    // Each counts with the record it stands in; some stand where the socket takes them from.
    constexpr uint64_t kMost = (4 << 20) / (sizeof(Frame) + kHeadBytes + sizeof(uint64_t)) + 128;
    while (!host.is_lost() && num_said < kMost) say();
    CHECK(host.is_lost());
    CHECK(peer.connection().counters.requests_served.load() + 1 == num_said);
    CHECK(host.cause == "protocol error: more answers than requests may be open wait to be read");
    peer.leave(false);
  }
  host.check();
}

// Bytes and the end in one event, which was taken for the bytes alone: the end was noticed by
// another lane, if that had none.
TEST_CASE("the end of a lane is noticed although bytes came with it") {
  TcpHost host;
  {
    TcpPeer peer(host, 2);
    peer.say(0, ByteView(encode_plain(Type::kPing, {})).first(kHeadBytes - 1));
    peer.lane(0).end();
    peer.work();
    CHECK(host.is_lost());
    CHECK(host.cause == "the peer's process or engine ended (end of stream)");
    peer.leave(false);
  }
  host.check();
}
