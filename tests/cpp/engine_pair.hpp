// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two engines in one process over the transport that ctest names: KVXFER_TEST_TRANSPORT, with
// KVXFER_TEST_SHARE=never for memory that no peer may map, KVXFER_TEST_COPY_THREADS for a pool,
// KVXFER_TEST_BACKGROUND for memory that is used while it is registered, and KVXFER_TEST_VERBS_PUSH
// for writes that verbs pushes.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "ended_in_order.hpp"
#include "engine/engine.hpp"

namespace kvxfer {

inline std::string transport() {
  const char* name = std::getenv("KVXFER_TEST_TRANSPORT");
  return name != nullptr ? name : "tcp";
}

struct Pair {
  std::shared_ptr<Engine> a, b;
  RegionPtr ra, rb;
  PeerPtr to_b;
  RemoteRegionPtr remote;

  explicit Pair(uint64_t nbytes = 1 << 22, const std::string& listen = "127.0.0.1:0",
                const TransportConfig& config = {}) {
    EngineOptions options;
    options.transport = config;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {transport()};
    options.listen = listen;
    if (std::getenv("KVXFER_TEST_BACKGROUND") != nullptr)
      options.transport.verbs_background_nbytes = 0;
    if (const char* threads = std::getenv("KVXFER_TEST_COPY_THREADS"))
      options.transport.copy_threads = std::atoi(threads);
    if (std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr) options.transport.verbs_push = true;
    options.name = "a";
    a = Engine::create(options);
    options.name = "b";
    b = Engine::create(options);
    ra = a->allocate(nbytes,
                     {.name = "kv", .shareable = std::getenv("KVXFER_TEST_SHARE") == nullptr});
    rb = b->allocate(nbytes, {.name = "kv"});
    to_b = a->connect(b->address(), 10);
    remote = a->regions_of(*to_b).at("kv");
  }
  ~Pair() {
    a->close();
    b->close();
    check_ended_in_order();
  }
  std::byte* at_a(size_t offset) const { return ra->pieces[0].base + offset; }
  std::byte* at_b(size_t offset) const { return rb->pieces[0].base + offset; }

  TransferPtr move(Op op, int64_t local, int64_t into, int64_t nbytes, SubmitOptions options = {}) {
    const Column l{&local, 1, true}, r{&into, 1, true}, n{&nbytes, 1, true};
    if (options.deadline_ns == kNever) options.deadline_ns = deadline_after(30);
    return a->submit(op, ra, remote, SpanArguments{l, r, n, {}, false}, std::move(options));
  }
  LeasePtr grant(int64_t offset, int64_t nbytes, uint64_t num_arrivals = 0, double ttl_s = 60) {
    return b->grant(rb, {&offset, 1, true}, {&nbytes, 1, true}, ttl_s, {}, num_arrivals);
  }
};

// By memcmp, which the sanitizers check as one range: a loop over bytes takes minutes there.
inline bool all_equal(const std::byte* data, size_t nbytes, int value) {
  return data[0] == std::byte(value) && std::memcmp(data, data + 1, nbytes - 1) == 0;
}

inline void finish(const TransferPtr& t, State expected = State::kDone) {
  REQUIRE(t->wait(deadline_after(30)) == Woken::kNotified);
  INFO(t->message);
  CHECK(t->state.load() == expected);
}

inline SubmitOptions under(const LeasePtr& lease) {
  SubmitOptions options;
  options.has_lease = true;
  options.lease = lease->token;
  return options;
}
inline SubmitOptions arriving(const LeasePtr& lease, uint64_t arrival) {
  SubmitOptions options = under(lease);
  options.has_arrival = true;
  options.arrival = arrival;
  return options;
}

}  // namespace kvxfer
