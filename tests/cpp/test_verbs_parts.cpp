// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The parts of the verbs transport that need no device: addresses, timeouts, chains.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <utility>

#include "common/clock.hpp"
#include "transport/verbs/chain_queue.hpp"
#include "transport/verbs/memlock.hpp"
#include "transport/verbs/nearness.hpp"
#include "transport/verbs/pairing.hpp"

using namespace kvxfer;
using namespace kvxfer::verbs;

namespace {

Gid gid(uint16_t index, GidType type, std::initializer_list<int> bytes) {
  Gid out;
  out.index = index;
  out.type = type;
  size_t i = 0;
  for (const int b : bytes) out.raw[i++] = static_cast<std::byte>(b);
  return out;
}
Gid ipv4(uint16_t index, int a, int b, int c, int d, GidType type = GidType::kRoceV2) {
  return gid(index, type, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d});
}
Gid link_local(uint16_t index, int last, GidType type = GidType::kRoceV2) {
  return gid(index, type, {0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last});
}
Gid global_v6(uint16_t index, int last) {
  return gid(index, GidType::kRoceV2, {0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last});
}
PortAddress ethernet(std::vector<Gid> gids) {
  PortAddress out;
  out.mtu = 5;
  out.gids = std::move(gids);
  return out;
}

std::optional<Path> choose(const PortAddress& a, const PortAddress& b, int index = -1) {
  std::string reason;
  auto path = choose_path(a, b, index, reason);
  CHECK(path.has_value() == reason.empty());
  return path;
}

}  // namespace

TEST_CASE("GIDs: RoCE v2 before v1, one family, the nearest subnet") {
  const auto here = ethernet({link_local(0, 1, GidType::kRoceV1), link_local(1, 1),
                              ipv4(2, 10, 1, 0, 1, GidType::kRoceV1), ipv4(3, 10, 1, 0, 1),
                              ipv4(4, 10, 2, 0, 1), global_v6(5, 1)});
  const auto there = ethernet({link_local(0, 2), ipv4(1, 10, 2, 0, 2), ipv4(2, 192, 168, 0, 2)});
  const auto path = choose(here, there);
  REQUIRE(path);
  CHECK(path->global);
  CHECK(path->local.index == 4);
  CHECK(path->remote.index == 1);
  CHECK(path->reason.find("10.2.0.1") != std::string::npos);
}

TEST_CASE("GIDs: link-local only where there is nothing else") {
  const auto only = choose(ethernet({link_local(0, 1), ipv4(1, 10, 0, 0, 1)}),
                           ethernet({link_local(7, 2), global_v6(8, 2)}));
  REQUIRE(only);
  CHECK(only->local.index == 0);
  CHECK(only->remote.index == 7);
  // Far subnets are still better: they can be routed.
  const auto far = choose(ethernet({link_local(0, 1), ipv4(1, 10, 0, 0, 1)}),
                          ethernet({link_local(7, 2), ipv4(8, 192, 168, 0, 2)}));
  REQUIRE(far);
  CHECK(far->local.index == 1);
}

TEST_CASE("GIDs: the user's choice, and reasons where there is no pair") {
  const auto here = ethernet({ipv4(1, 10, 0, 0, 1), ipv4(2, 10, 9, 0, 1)});
  const auto there = ethernet({ipv4(1, 10, 0, 0, 2)});
  CHECK(choose(here, there)->local.index == 1);
  CHECK(choose(here, there, 2)->local.index == 2);
  CHECK_FALSE(choose(here, there, 3));
  CHECK_FALSE(choose(here, ethernet({link_local(0, 2)})));
  CHECK_FALSE(choose(here, ethernet({ipv4(0, 10, 0, 0, 2, GidType::kRoceV1)})));
  PortAddress infiniband;
  infiniband.infiniband = true;
  infiniband.lid = 3;
  CHECK_FALSE(choose(here, infiniband));
}

TEST_CASE("InfiniBand: by LID within one subnet, by GID across") {
  const auto port = [](int subnet, uint16_t lid) {
    PortAddress out;
    out.infiniband = true;
    out.lid = lid;
    out.gids = {gid(0, GidType::kInfiniband,
                    {0xfe, 0x80, 0, 0, 0, 0, 0, subnet, 0, 0, 0, 0, 0, 0, 0, lid})};
    return out;
  };
  CHECK_FALSE(choose(port(1, 4), port(1, 5))->global);
  CHECK(choose(port(1, 4), port(2, 5))->global);
  CHECK(choose(port(1, 4), port(1, 5), 0)->global);  // the user names a GID
}

TEST_CASE("addresses: decode after encode is the same, and lengths are checked") {
  const auto there = ethernet({link_local(0, 2), ipv4(1, 10, 2, 0, 2)});
  Bytes bytes;
  Writer writer(bytes);
  encode(there, writer);
  for (size_t n = 0; n < bytes.size(); ++n) {
    Reader cut(ByteView(bytes).first(n));
    CHECK_FALSE(decode_address(cut));
  }
  Reader whole(bytes);
  const auto again = decode_address(whole);
  REQUIRE(again);
  CHECK(whole.finished());
  CHECK(again->mtu == 5);
  REQUIRE(again->gids.size() == 2);
  CHECK(again->gids[1].raw == there.gids[1].raw);
  bytes[4] = std::byte{kMaxGids + 1};
  Reader many(bytes);
  CHECK_FALSE(decode_address(many));
}

TEST_CASE("retries end within half of the deadline") {
  for (const int64_t deadline_ns :
       {int64_t{100'000'000}, int64_t{1'000'000'000}, int64_t{30'000'000'000}}) {
    const uint8_t timeout = timeout_for(deadline_ns, 6);
    CHECK((int64_t{4096} << timeout) * 6 <= deadline_ns / 2);
    CHECK((int64_t{4096} << (timeout + 1)) * 6 > deadline_ns / 2);
  }
  CHECK(timeout_for(1, 6) == 8);  // sooner, a busy host would be taken for a lost one
  CHECK(timeout_for(kNever, 6) == 20);
}

TEST_CASE("chains: contiguous pieces share a READ, the chain is bounded") {
  Chunk chunk;
  auto* const base = reinterpret_cast<std::byte*>(uint64_t{0x10000});
  const Keys one{1, 11}, two{2, 11}, local{7, 17};
  CHECK(chunk.add(1000, one, base, local, 100, 4) == 100);
  CHECK(chunk.add(1100, one, base + 100, local, 100, 4) == 100);   // here as well: one piece
  CHECK(chunk.add(1200, one, base + 5000, local, 100, 4) == 100);  // there only: two pieces
  CHECK(chunk.num_requests() == 1);
  // Another key, if only on one of the rails.
  CHECK(chunk.add(1300, two, base + 6000, local, 100, 4) == 100);
  CHECK(chunk.add(9000, two, base + 6100, local, 100, 4) == 100);  // a gap over there
  CHECK(chunk.num_requests() == 3);
  CHECK(chunk.nbytes() == 500);
  chunk.clear();
  for (uint32_t i = 0; i < 6; ++i)  // pieces beyond the device's limit begin another READ
    CHECK(chunk.add(1000 + 10 * i, one, base + 1000 * i, local, 10, 4) == 10);
  CHECK(chunk.num_requests() == 2);
  chunk.clear();
  for (uint32_t i = 0; i < Chunk::kMaxRequests; ++i)
    CHECK(chunk.add(1000 * i, one, base + 1000 * i, local, 10, 4) == 10);
  CHECK(chunk.add(900'000, one, base, local, 10, 4) == 0);
  chunk.clear();
  CHECK(chunk.add(0, one, base, local, (1u << 20) + 5, 4) == 1u << 20);
  CHECK(chunk.add(1u << 20, one, base + (1u << 20), local, 5, 4) == 0);
}

TEST_CASE("rails: ports of one subnet first, in our order, each port once") {
  const auto port = [](int subnet, int host) { return ethernet({ipv4(3, 10, 0, subnet, host)}); };
  const auto pairs_of = [](const std::vector<PortAddress>& a, const std::vector<PortAddress>& b) {
    std::string reason;
    std::vector<std::pair<size_t, size_t>> out;
    for (const PortPair& pair : pair_ports(a, b, -1, reason))
      out.emplace_back(pair.local, pair.remote);
    CHECK(out.empty() == !reason.empty());
    return out;
  };
  using Pairs = std::vector<std::pair<size_t, size_t>>;
  CHECK(pairs_of({port(0, 1), port(1, 1)}, {port(0, 2), port(1, 2)}) == Pairs{{0, 0}, {1, 1}});
  CHECK(pairs_of({port(0, 1), port(1, 1)}, {port(1, 2), port(0, 2)}) == Pairs{{0, 1}, {1, 0}});
  // Two ports in one subnet: each takes the first that is left.
  CHECK(pairs_of({port(0, 1), port(0, 3)}, {port(0, 2), port(0, 4)}) == Pairs{{0, 0}, {1, 1}});
  // Whoever shares no subnet gets what is left, behind all who do: the first carries the messages
  // to begin with.
  CHECK(pairs_of({port(5, 1), port(1, 1)}, {port(1, 2), port(6, 2)}) == Pairs{{1, 0}, {0, 1}});
  CHECK(pairs_of({port(0, 1), port(1, 1)}, {port(1, 2)}) == Pairs{{1, 0}});
  CHECK(pairs_of({port(0, 1)}, {}) == Pairs{});
  // A port that cannot be used now has no addresses, and keeps its number.
  CHECK(pairs_of({ethernet({}), port(1, 1)}, {port(0, 2), port(1, 2)}) == Pairs{{1, 1}});
  // Link-local addresses are alike everywhere, so they say nothing about subnets.
  CHECK(pairs_of({ethernet({link_local(0, 1)}), port(1, 1)},
                 {ethernet({link_local(0, 2)}), port(1, 2)}) == Pairs{{1, 1}, {0, 0}});
}

TEST_CASE("locked memory: what to do is said where the limit is the cause, and only there") {
  const auto says = [](const Memlock& memlock, uint64_t nbytes, const char* what) {
    const std::string text = explain_memlock(memlock, nbytes);
    CAPTURE(text);
    return text.find(what) != std::string::npos;
  };
  const Memlock tight{.limit = 8 << 20, .pinned = 3 << 20};
  for (const char* what :
       {"is 8388608 bytes, of which 3145728 are pinned, and 6291456 more are wanted", "ulimit -l",
        "LimitMEMLOCK=infinity", "--ulimit memlock=-1", "every rail pins anew"})
    CHECK(says(tight, 6 << 20, what));
  CHECK_FALSE(says(tight, 6 << 20, "the device has no room"));
  // To the byte, and without an overflow.
  CHECK(says(tight, 5 << 20, "within it: the device has no room"));
  CHECK(says(tight, (5 << 20) + 1, "LimitMEMLOCK"));
  CHECK(says(tight, ~uint64_t{0}, "LimitMEMLOCK"));
  CHECK(says({.limit = 1 << 20, .pinned = 2 << 20}, 1, "LimitMEMLOCK"));
  CHECK(says({.limit = 1 << 20, .pinned = {}}, 2 << 20, "is 1048576 bytes, and 2097152 more"));
  CHECK(says({}, 1 << 20, "is none, so the device has no room"));
  CHECK(says({.limit = 1 << 20, .pinned = {}, .may_exceed = true}, 2 << 20, "CAP_IPC_LOCK"));
}

TEST_CASE("locked memory: the limit is this process's") {
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_MEMLOCK, &before) == 0);
  const rlimit lower{std::min<rlim_t>(before.rlim_max, 5 << 20), before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_MEMLOCK, &lower) == 0);
  const Memlock now = memlock_now();
  REQUIRE(::setrlimit(RLIMIT_MEMLOCK, &before) == 0);
  REQUIRE(now.limit);
  CHECK(*now.limit == lower.rlim_cur);
  REQUIRE(now.pinned);  // VmPin, since Linux 3.2
  CHECK(*now.pinned % 1024 == 0);
}
