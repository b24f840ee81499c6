// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A copier is parked in the windows that matter, and the other side cancels, revokes, retries or
// closes. Random stops do not find these windows.
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "common/hooks.hpp"
#include "engine_pair.hpp"

using namespace kvxfer;
using hooks::Point;

namespace {

// Long enough for a copier that is not held back to show itself; only ever waited in full when the
// test passes.
constexpr auto kSettle = std::chrono::milliseconds(50);
constexpr auto kPatience = std::chrono::seconds(20);

// Holds the first thread that reaches `point`, and counts all that reach any.
class Park {
 public:
  explicit Park(Point point) : point_(point) {
    current = this;
    hooks::handler.store(&Park::reached, std::memory_order_release);
  }
  ~Park() {
    release();
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return !inside_; });
    hooks::handler.store(nullptr, std::memory_order_release);
  }
  bool wait_parked() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return inside_; });
  }
  // True when more than `n` threads came to the point although one is parked there.
  bool others_come() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSettle, [&] { return visits_[index(point_)] > 1; });
  }
  void release() {
    std::lock_guard lock(mutex_);
    released_ = true;
    changed_.notify_all();
  }

 private:
  static size_t index(Point point) { return static_cast<size_t>(point); }
  static void reached(Point point) { current->on(point); }
  void on(Point point) {
    std::unique_lock lock(mutex_);
    ++visits_[index(point)];
    changed_.notify_all();
    if (point != point_ || visits_[index(point)] > 1 || released_) return;
    inside_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return released_; });
    inside_ = false;
    changed_.notify_all();
  }

  static inline Park* current = nullptr;
  const Point point_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<int, 4> visits_{};
  bool inside_ = false, released_ = false;
};

constexpr int64_t kBytes = 1 << 20;

bool wait_quiesced(const TransferPtr& t) {
  const int64_t deadline = deadline_after(20);
  for (;;) {
    const uint32_t seen = t->changed.read();
    if (t->quiesced) return true;
    if (t->changed.wait(seen, deadline) == Woken::kTimedOut) return t->quiesced;
  }
}

SubmitOptions first_of(const LeasePtr& lease) {
  SubmitOptions options = under(lease);
  options.has_arrival = options.has_notify = true;
  options.arrival = 0;
  return options;
}

// Both sides know each other's outcome through the slot word; over a network they cannot.
// Where both sides see one word: cancelled or accepted, never in doubt.
bool agrees() { return transport() == "shm"; }

}  // namespace

TEST_CASE("a request is not started while a copier is inside a cancelled one") {
  Pair pair;
  Park park(Point::kInsideChunk);
  std::memset(pair.at_a(0), 0x11, kBytes);
  TransferPtr first = pair.move(Op::kWrite, 0, 0, kBytes);
  REQUIRE(park.wait_parked());
  pair.a->cancel(first);
  finish(first, State::kCancelled);
  CHECK(first->agreed == agrees());
  REQUIRE(wait_quiesced(first));
  std::memset(pair.at_a(0), 0x22, kBytes);  // quiesced: ours again
  TransferPtr second = pair.move(Op::kWrite, 0, 0, kBytes);
  CHECK_FALSE(park.others_come());
  CHECK_FALSE(second->terminal());
  park.release();
  finish(second);
  CHECK(all_equal(pair.at_b(0), kBytes, 0x22));
}

TEST_CASE("revoke is quiet only after the parked copier has left") {
  Pair pair;
  Park park(Point::kInsideChunk);
  std::memset(pair.at_a(0), 0x11, kBytes);
  LeasePtr lease = pair.grant(0, kBytes, 1);
  TransferPtr write = pair.move(Op::kWrite, 0, 0, kBytes, first_of(lease));
  REQUIRE(park.wait_parked());
  pair.b->begin_revoke(lease);
  CHECK(lease->gate.wait_quiet(deadline_after(0.05)) == Woken::kTimedOut);
  park.release();
  REQUIRE(lease->gate.wait_quiet(deadline_after(20)) == Woken::kNotified);
  std::memset(pair.at_b(0), 0xee, kBytes);  // reused at once
  finish(write, State::kFailed);
  CHECK(write->failure.code == Code::kLease);
  CHECK(all_equal(pair.at_b(0), kBytes, 0xee));
  CHECK(lease->num_arrived == 0);
  CHECK(pair.b->notifications().empty());
}

TEST_CASE("a revoke that meets an acceptance waits for it, and it counts") {
  for (Point point : {Point::kBeforeAccept, Point::kAfterAccept}) {
    Pair pair;
    Park park(point);
    LeasePtr lease = pair.grant(0, kBytes, 1);
    TransferPtr write = pair.move(Op::kWrite, 0, 0, kBytes, first_of(lease));
    REQUIRE(park.wait_parked());
    pair.b->begin_revoke(lease);
    CHECK(lease->gate.wait_quiet(deadline_after(0.05)) == Woken::kTimedOut);
    CHECK(lease->num_arrived == 0);
    park.release();
    REQUIRE(lease->gate.wait_quiet(deadline_after(20)) == Woken::kNotified);
    CHECK(lease->num_arrived == 1);  // whoever saw it quiet sees all of it
    CHECK(pair.b->notifications().size() == 1);
    finish(write);
  }
}

TEST_CASE("a cancel before the acceptance wins it, where both sides can agree") {
  Pair pair;
  Park park(Point::kBeforeAccept);
  std::memset(pair.at_a(0), 0x11, kBytes);
  LeasePtr lease = pair.grant(0, kBytes, 1);
  TransferPtr write = pair.move(Op::kWrite, 0, 0, kBytes, first_of(lease));
  REQUIRE(park.wait_parked());
  pair.a->cancel(write);
  finish(write, State::kCancelled);
  CHECK(write->agreed == agrees());
  REQUIRE(wait_quiesced(write));  // although the target stands still
  std::memset(pair.at_a(0), 0x99, kBytes);
  park.release();
  finish(pair.move(Op::kWrite, kBytes, kBytes, 64));  // all before it is decided
  CHECK(lease->num_arrived == (agrees() ? 0 : 1));
  CHECK(pair.b->notifications().size() == (agrees() ? 0 : 1));
  if (!agrees()) CHECK(all_equal(pair.at_b(0), kBytes, 0x11));  // not the poison
}

TEST_CASE("a cancel after the acceptance comes too late, where both sides can agree") {
  Pair pair;
  Park park(Point::kAfterAccept);
  std::memset(pair.at_a(0), 0x11, kBytes);
  LeasePtr lease = pair.grant(0, kBytes, 1);
  TransferPtr write = pair.move(Op::kWrite, 0, 0, kBytes, first_of(lease));
  REQUIRE(park.wait_parked());
  pair.a->cancel(write);
  finish(write, agrees() ? State::kDone : State::kCancelled);
  CHECK(write->agreed == agrees());
  CHECK(write->nbytes_done == (agrees() ? kBytes : 0));
  REQUIRE(wait_quiesced(write));
  std::memset(pair.at_a(0), 0x99, kBytes);
  CHECK(lease->num_arrived == 0);  // not visible before the copier says so
  park.release();
  finish(pair.move(Op::kWrite, kBytes, kBytes, 64));
  CHECK(lease->num_arrived == 1);
  CHECK(pair.b->notifications().size() == 1);
  CHECK(all_equal(pair.at_b(0), kBytes, 0x11));
}

TEST_CASE("a cancelled read keeps its memory until its own copier has left") {
  Pair pair;
  Park park(Point::kInsideRead);
  std::memset(pair.at_b(0), 0x11, kBytes);
  TransferPtr read = pair.move(Op::kRead, 0, 0, kBytes);
  REQUIRE(park.wait_parked());
  pair.a->cancel(read);
  finish(read, State::kCancelled);
  CHECK_FALSE(read->quiesced);
  CHECK(pair.a->stats().unquiesced == 1);
  CHECK_THROWS_WITH_AS(pair.a->deregister(pair.ra), doctest::Contains("not quiesced"), Error);
  park.release();
  REQUIRE(wait_quiesced(read));
  std::memset(pair.at_a(0), 0x22, kBytes);
  finish(pair.move(Op::kRead, kBytes, kBytes, 64));  // the rest of the first has drained
  CHECK(all_equal(pair.at_a(0), kBytes, 0x22));
}

TEST_CASE("the writer closes while the owner's copier is parked, then the owner") {
  Pair pair;
  Park park(Point::kInsideChunk);
  TransferPtr write = pair.move(Op::kWrite, 0, 0, kBytes);
  REQUIRE(park.wait_parked());
  pair.a->close();  // needs nobody over there
  CHECK(write->state == State::kCancelled);
  CHECK(write->quiesced);
  std::mutex mutex;
  std::condition_variable changed;
  bool closed = false;
  std::thread closer([&] {
    pair.b->close();
    std::lock_guard lock(mutex);
    closed = true;
    changed.notify_all();
  });
  {
    std::unique_lock lock(mutex);
    CHECK_FALSE(changed.wait_for(lock, kSettle, [&] { return closed; }));
  }
  park.release();
  closer.join();
  std::memset(pair.at_b(0), 0xee, kBytes);  // the owner's alone now
  CHECK(all_equal(pair.at_b(0), kBytes, 0xee));
}

TEST_CASE("spans of a lease that is not quiet are quarantined: counted, and not granted again") {
  Pair pair;
  Park park(Point::kBeforeAccept);
  LeasePtr lease = pair.grant(100, 1000);
  TransferPtr t = pair.move(Op::kWrite, 0, 100, 10, under(lease));
  REQUIRE(park.wait_parked());
  pair.b->begin_revoke(lease);
  CHECK_FALSE(lease->gate.quiet());
  CHECK(pair.b->stats().quarantined_nbytes == 1000);
  std::string message;
  try {
    pair.grant(1099, 10);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("bytes 1099 to 1109 of region 'kv' are quarantined") != std::string::npos);
  pair.grant(1100, 10);  // beside it
  pair.grant(0, 100);
  park.release();
  REQUIRE(lease->gate.wait_quiet(deadline_after(20)) == Woken::kNotified);
  pair.grant(100, 1000);  // at once
  CHECK(pair.b->stats().quarantined_nbytes == 0);
  REQUIRE(t->wait(deadline_after(20)) == Woken::kNotified);
}
