// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// With several copiers: a request waits while one of them is inside its cancelled predecessor.
#include <doctest/doctest.h>

#include <atomic>
#include <cstring>

#include "common/hooks.hpp"
#include "engine/engine.hpp"

using namespace kvxfer;

namespace {

// The first copier to come parks inside its chunk until it is let go; all are counted.
struct Parking {
  static inline std::atomic<int> inside{0};
  static inline std::atomic<bool> parked{false};
  static inline WaitWord word;
  static void reached(hooks::Point point) {
    if (point != hooks::Point::kInsideChunk) return;
    const bool first = inside.fetch_add(1) == 0;
    word.notify_all();
    if (first) wait([] { return !parked; });
  }
  template <typename Look>
  static bool wait(Look&& look) {
    const int64_t deadline_ns = deadline_after(30);
    for (;;) {
      const uint32_t seen = word.read();
      if (look()) return true;
      if (word.wait(seen, deadline_ns) == Woken::kTimedOut) return look();
    }
  }
  Parking() {
    inside = 0;
    parked = true;
    hooks::handler = &reached;
  }
  ~Parking() {
    release();
    hooks::handler = nullptr;
  }
  static void release() {
    parked = false;
    word.notify_all();
  }
};

TransferPtr write(Engine& from, const RegionPtr& local, const RemoteRegionPtr& remote,
                  int64_t offset, int64_t nbytes) {
  const int64_t into = 0;
  SubmitOptions options;
  options.deadline_ns = deadline_after(60);
  return from.submit(
      Op::kWrite, local, remote,
      SpanArguments{{&offset, 1, true}, {&into, 1, true}, {&nbytes, 1, true}, {}, false}, options);
}

}  // namespace

TEST_CASE("shm with a copy pool: a retry does not begin while a copier is inside what it repeats") {
  for (const bool mapped : {true, false}) {
    constexpr int64_t kBytes = 60'000;  // one chunk, also when staged
    EngineOptions options;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {"shm"};
    options.transport.copy_threads = 4;
    auto a = Engine::create(options), b = Engine::create(options);
    auto source = a->allocate(2 * kBytes, {.name = "source", .shareable = mapped});
    auto target = b->allocate(kBytes, {.name = "target"});
    std::memset(source->pieces[0].base, 0x11, kBytes);
    std::memset(source->pieces[0].base + kBytes, 0x22, kBytes);
    PeerPtr peer = a->connect(b->address(), 10);
    RemoteRegionPtr remote = a->regions_of(*peer).at("target");

    Parking parking;
    TransferPtr first = write(*a, source, remote, 0, kBytes);
    REQUIRE(Parking::wait([] { return Parking::inside >= 1; }));
    a->cancel(first);
    CHECK(first->state == State::kCancelled);
    CHECK(first->agreed);
    TransferPtr second = write(*a, source, remote, kBytes, kBytes);
    // A message that was posted after it is through: the owner has read up the second write.
    SubmitOptions note;
    note.has_notify = true;
    note.deadline_ns = deadline_after(30);
    TransferPtr after = a->notify(peer, note);
    REQUIRE(after->wait(deadline_after(30)) == Woken::kNotified);
    CHECK(after->state == State::kDone);
    CHECK_FALSE(second->terminal());
    CHECK(Parking::inside == 1);

    Parking::release();
    REQUIRE(second->wait(deadline_after(30)) == Woken::kNotified);
    CHECK(second->state == State::kDone);
    const std::byte* data = target->pieces[0].base;
    CHECK(data[0] == std::byte{0x22});
    CHECK(std::memcmp(data, data + 1, kBytes - 1) == 0);
    a->close();
    b->close();
  }
}
