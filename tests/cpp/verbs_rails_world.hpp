// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines joined by two rails of software NICs, and what tests of them look at. Run with
// KVXFER_FAKE_VERBS=devices=2.
#pragma once

#include <poll.h>

#include <functional>
#include <random>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"
#include "transport/verbs/connection.hpp"
#include "verbs_plan.hpp"

namespace rails {

using namespace kvxfer;
using verbs::VerbsConnection;

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kBytes = 8 * kMiB;

inline bool eventually(const std::function<bool()>& done) { return eventually_within(30, done); }

// Everything is as it was in the beginning, whatever the test has done.
struct Whole {
  ~Whole() {
    for (const char* device : {"fake0", "fake1"}) {
      fake_verbs_restore_device(device);
      fake_verbs_set_port(device, 1, 1);
      fake_verbs_cut_port(device, 1, 0);
    }
    fake_verbs_plan("");
  }
};

inline VerbsConnection& connection_of(const PeerPtr& peer) {
  std::lock_guard lock(peer->mutex);
  return dynamic_cast<VerbsConnection&>(*peer->links.at(0)->data.at(0));
}

struct World : Whole, Pair {
  explicit World(const TransportConfig& config = impatient())
      : Pair(4 * kBytes, "127.0.0.1:0", config) {
    REQUIRE(eventually([this] {
      for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
      return to_a != nullptr;
    }));
    REQUIRE(eventually([this] { return both_in_use(); }));
    std::mt19937 random(7);
    auto* const words = reinterpret_cast<uint32_t*>(at_a(0));
    for (int64_t i = 0; i < kBytes / 4; ++i) words[i] = static_cast<uint32_t>(random());
    std::memset(at_b(0), 0, kBytes);
  }
  // Who pulls what the other side's memory has: b for writes, a for reads.
  std::vector<VerbsConnection::Carried> at(const PeerPtr& peer) const {
    return connection_of(peer).carried();
  }
  std::vector<VerbsConnection::Carried> writes() const { return at(to_a); }
  std::vector<VerbsConnection::Carried> reads() const { return at(to_b); }
  bool in_use(size_t rail) const { return writes()[rail].in_use && reads()[rail].in_use; }
  bool both_in_use() const { return in_use(0) && in_use(1); }
  bool same(int64_t nbytes = kBytes) const { return std::memcmp(at_a(0), at_b(0), nbytes) == 0; }
  bool alive() const { return to_b->alive.load() && to_a->alive.load(); }
  TransferPtr write(int64_t nbytes = kBytes, SubmitOptions options = {}) {
    return move(Op::kWrite, 0, 0, nbytes, std::move(options));
  }
  // Of what a.write() has brought there, to another place.
  TransferPtr read(int64_t nbytes = kBytes, SubmitOptions options = {}) {
    return move(Op::kRead, kBytes, 0, nbytes, std::move(options));
  }
  PeerPtr to_a;
};

inline uint64_t total(const std::vector<VerbsConnection::Carried>& rails) {
  uint64_t sum = 0;
  for (const auto& rail : rails) sum += rail.nbytes;
  return sum;
}

inline bool quiesces(const TransferPtr& t) {
  return eventually([&] { return t->quiesced.load(); });
}

inline void check_empty() {
  for (const char* what : {"qps", "cqs", "regions", "windows", "locked_bytes"})
    CHECK_MESSAGE(eventually([&] { return fake_verbs_count(what) == 0; }), what);
}

// A write whose chains are all posted, on both rails, and of which nothing comes back.
struct HeldWrite {
  std::vector<uint32_t> pullers;
  TransferPtr transfer;

  HeldWrite(World& w, int64_t nbytes, SubmitOptions options) {
    for (const auto& rail : w.writes()) pullers.push_back(rail.puller);
    for (const uint32_t puller : pullers) fake_verbs_hold(puller);
    const int64_t requests = fake_verbs_count("work_requests");
    const int64_t doorbells = fake_verbs_count("doorbells");
    transfer = w.write(nbytes, std::move(options));
    // The request itself, and b's chains: a READ each.
    const int64_t expected = 1 + nbytes / kMiB;
    REQUIRE(eventually([&] {
      return fake_verbs_count("work_requests") >= requests + expected &&
             fake_verbs_count("doorbells") >= doorbells + expected;
    }));
  }
  ~HeldWrite() { release(); }
  void release() const {
    for (const uint32_t puller : pullers) fake_verbs_release(puller);
  }
};

// `cancelled` was to arrive as 0: once it is quiet and `let_go` has let through what was held of
// it, a retry that arrives as 1 is all that was accepted.
inline void check_retry_alone_is_accepted(World& w, const LeasePtr& lease,
                                          const TransferPtr& cancelled,
                                          const std::function<void()>& let_go) {
  REQUIRE(quiesces(cancelled));
  std::memset(w.at_a(0), 0x66, kBytes);  // poison: never to be accepted for the cancelled write
  let_go();
  ::poll(nullptr, 0, 20);
  std::memset(w.at_a(0), 0x22, kBytes);
  finish(w.write(kBytes, arriving(lease, 1)));
  CHECK(all_equal(w.at_b(0), kBytes, 0x22));
  CHECK_FALSE(lease->arrived(0));
  CHECK(lease->arrived(1));
}

}  // namespace rails
