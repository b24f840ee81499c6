// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines over software NICs, of which one pushes its writes under leases to the other.
#pragma once

#include <functional>
#include <optional>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"
#include "transport/verbs/connection.hpp"
#include "verbs_plan.hpp"

namespace kvxfer {

inline bool eventually(const std::function<bool()>& done) { return eventually_within(30, done); }

inline TransportConfig pushing() {
  TransportConfig config = impatient();
  config.verbs_push = true;
  return config;
}

inline constexpr int64_t kBytes = 1 << 20;

struct PushWorld : Pair {
  explicit PushWorld(uint64_t nbytes = 1 << 24, const TransportConfig& config = pushing())
      : Pair(nbytes, "127.0.0.1:0", config) {
    std::memset(at_a(0), 0x11, static_cast<size_t>(nbytes));
    std::memset(at_b(0), 0, static_cast<size_t>(nbytes));
    REQUIRE(eventually([this] {
      for (const PeerEvent& event : b->peer_events()) to_a = event.peer;
      return to_a != nullptr;
    }));
  }
  static verbs::VerbsConnection& of(const PeerPtr& peer) {
    std::lock_guard lock(peer->mutex);
    return dynamic_cast<verbs::VerbsConnection&>(*peer->links.at(0)->data.at(0));
  }
  std::vector<verbs::VerbsConnection::Carried> writer() const { return of(to_b).carried(); }
  std::vector<verbs::VerbsConnection::Carried> owner() const { return of(to_a).carried(); }
  // Of a's writes: pushed by a's NICs, pulled by b's.
  uint64_t pushed() const {
    uint64_t sum = 0;
    for (const auto& rail : writer()) sum += rail.nbytes_pushed;
    return sum;
  }
  uint64_t pulled() const {
    uint64_t sum = 0;
    for (const auto& rail : owner()) sum += rail.nbytes;
    return sum;
  }
  uint32_t sink(size_t rail = 0) const { return owner()[rail].sink; }
  uint32_t pusher(size_t rail = 0) const { return writer()[rail].pusher; }
  uint32_t control_of_a() const { return of(to_b).ends().rails[0].control.number; }
  uint32_t control_of_b() const { return of(to_a).ends().rails[0].control.number; }
  std::string explained() const { return a->explain(*to_b); }
  bool alive() const { return to_b->alive.load() && to_a->alive.load(); }
  bool explains(const std::string& text) const {
    const bool found = explained().find(text) != std::string::npos;
    if (!found) MESSAGE(explained());
    return found;
  }

  TransferPtr write(const LeasePtr& lease, int64_t nbytes = kBytes, int64_t into = 0,
                    std::optional<uint64_t> arrival = {}) {
    SubmitOptions options = under(lease);
    options.has_arrival = arrival.has_value();
    options.arrival = arrival.value_or(0);
    return move(Op::kWrite, into, into, nbytes, std::move(options));
  }
  // Both sides have their queue pairs for pushes, and a few bytes have gone through them.
  void warm_up() {
    const LeasePtr lease = grant(0, 4096);
    finish(write(lease, 4096));
    REQUIRE(pushed() > 0);
    revoke(lease);
    std::memset(at_b(0), 0, 4096);
  }
  void revoke(const LeasePtr& lease) const {
    b->begin_revoke(lease);
    REQUIRE(eventually([&] { return lease->gate.quiet(); }));
  }
  PeerPtr to_a;
};

// Packets to these queue pairs wait as long as this lives.
struct Held {
  explicit Held(std::vector<uint32_t> some) : numbers(std::move(some)) {
    for (const uint32_t number : numbers) fake_verbs_hold(number);
  }
  ~Held() { release(); }
  void release() const {
    for (const uint32_t number : numbers) fake_verbs_release(number);
  }
  const std::vector<uint32_t> numbers;
};

// A write whose chains are all posted, on whatever rails, and of which nothing is delivered.
struct HeldPush {
  HeldPush(PushWorld& w, const LeasePtr& lease, int64_t nbytes) : held(sinks(w)) {
    const int64_t before = fake_verbs_count("doorbells");
    transfer = w.write(lease, nbytes, 0, 0);
    // The request, and each chain.
    REQUIRE(
        eventually([&] { return fake_verbs_count("doorbells") >= before + 1 + nbytes / kBytes; }));
  }
  static std::vector<uint32_t> sinks(const PushWorld& w) {
    std::vector<uint32_t> out;
    for (size_t rail = 0; rail < w.owner().size(); ++rail)
      if (w.sink(rail) != 0) out.push_back(w.sink(rail));
    return out;
  }
  Held held;
  TransferPtr transfer;
};

inline bool quiesces(const TransferPtr& t) {
  return eventually([&] { return t->quiesced.load(); });
}

}  // namespace kvxfer
