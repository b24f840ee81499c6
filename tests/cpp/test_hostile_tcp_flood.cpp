// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Acknowledgements that a tcp peer asks for and does not read, with the fuzz target's peer: there
// are no sockets, so each request has its own answer. (Through sockets a turn of the engine answers
// dozens of requests at once; what shows the bound then is a flood of 70 MB.)
#include <doctest/doctest.h>

#include "fuzz/tcp_peer.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;
using fuzz::kKey;
using fuzz::TcpHost;
using fuzz::TcpPeer;

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
    CHECK(peer.lane(0).heard.size() == kHeadBytes + sizeof(uint64_t));  // an ACK
    peer.lane(0).room = 0;
    // Every one counts at least for the bytes that it has.
    constexpr uint64_t kMost = (4 << 20) / (kHeadBytes + sizeof(uint64_t));
    while (!host.is_lost() && num_said < kMost) say();
    CHECK(host.is_lost());
    CHECK(peer.connection().counters.requests_served.load() == num_said);
    CHECK(host.cause == "protocol error: more answers than requests may be open wait to be read");
    peer.leave(false);
  }
  host.check();
}
