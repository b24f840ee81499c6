// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer over cma that lies about its memory: where it is, how long it is, and that it is the
// peer's. The peer's process is this one, so that its addresses are ours to unmap. The oracle is
// the fuzz target's: no byte outside a lease changes, each request of ours has one end.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "fuzz/shm_peer.hpp"
#include "transport/cma/peer.hpp"

using namespace kvxfer;
using namespace kvxfer::shm;
using kvxfer::fuzz::kKey;
using kvxfer::fuzz::ShmHost;
using kvxfer::fuzz::ShmPeer;

namespace {

constexpr uint64_t kPage = 4096, kTheirRegion = 5, kFar = ~uint64_t{0}, kHuge = uint64_t{1} << 60;

// Two pages of the peer's: the first is there, the second is not.
class TheirMemory {
 public:
  TheirMemory()
      : base_(static_cast<std::byte*>(::mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(base_ != MAP_FAILED);
    std::memset(base_, static_cast<int>(fuzz::kTheirs), kPage);
    show_second(false);
  }
  ~TheirMemory() { ::munmap(base_, 2 * kPage); }
  void show_second(bool shown) noexcept {
    ::mprotect(base_ + kPage, kPage, shown ? PROT_READ : PROT_NONE);
  }
  uint64_t at(uint64_t offset) const noexcept { return reinterpret_cast<uint64_t>(base_) + offset; }

 private:
  std::byte* base_;
};

struct World {
  TheirMemory memory;
  alignas(16) Incarnation word{std::byte{7}};
  ShmHost host;
  ShmPeer peer;

  explicit World(std::shared_ptr<Mapping> control = nullptr)
      : peer(host, std::move(control),
             cma::make_reach(std::make_shared<cma::Peer>(
                 ::getpid(), reinterpret_cast<uint64_t>(&word), word))) {}
  ~World() {
    peer.leave();
    host.check();
  }
  // What stands in a message of its Unix socket behind the head.
  static Bytes pieces(std::initializer_list<std::pair<uint64_t, uint64_t>> all) {
    Bytes bytes;
    Writer writer(bytes);
    for (const auto& [address, nbytes] : all) writer.u64(address), writer.u64(nbytes);
    return bytes;
  }
  void show(uint64_t nbytes, ByteView shown, std::span<const int> fds = {}) {
    peer.announce(1, kTheirRegion, nbytes, shown, fds);
  }
  void show_words(ByteView shown, std::span<const int> fds = {}) {
    peer.announce(4, 0, ExportedWords::kBytes, shown, fds);
  }
  void poll() {
    for (int i = 0; i < 8; ++i) peer.connection().poll();
  }
  // How a write of the peer's, of one span of its region, has ended.
  Slot write(uint64_t source, uint32_t nbytes, uint64_t target = 0) {
    const SpanRecord span{.source = source, .target = target, .nbytes = nbytes, .index = 0};
    const RequestHead head{.ticket = {0, ++generation_},
                           .flags = kMapped | kInline,
                           .num_spans = 1,
                           .nbytes = nbytes,
                           .region = {ShmHost::kShown, kKey},
                           .lease = {ShmHost::kShown, kKey},
                           .source = kTheirRegion};
    auto& slot = peer.side(1).slots[0];
    slot.store(slot_word(generation_, Slot::kPosted));
    peer.message(Type::kRequest, {view_of(head), view_of(span)});
    poll();
    peer.hear();
    CHECK((slot.load() >> 32) == generation_);
    return static_cast<Slot>(slot.load() & 0xffffffff);
  }
  // A read of ours of 3 spans of 32 bytes, which the peer has been asked for.
  bool read() {
    const RequestPtr request = host.next(Op::kRead, false, 3, 32, 0);
    return request && host.post(peer.connection(), request);
  }
  void grant(uint64_t num_spans, Ticket of = {0, 1}, WordRef region = {}, WordRef lease = {}) {
    const GrantHead head{of, kTheirRegion, num_spans, region, lease};
    peer.message(Type::kGranted, {view_of(head)});
    poll();
  }

 private:
  uint32_t generation_ = 0;
};

}  // namespace

TEST_CASE("memory of a cma peer that is not there refuses the write, and harms nothing else") {
  struct Lie {
    std::string what;
    uint64_t nbytes;
    Bytes pieces;
    uint64_t source;
    uint32_t span_nbytes;
  };
  const TheirMemory away;  // another's second page is as far away as this one's
  const uint64_t there = away.at(0), gone = away.at(kPage);
  const Lie lies[] = {
      {"a page that nobody may read", kPage, World::pieces({{gone, kPage}}), 0, 64},
      {"into that page", 2 * kPage, World::pieces({{there, 2 * kPage}}), kPage - 32, 64},
      {"into a piece that is there no more", 64, World::pieces({{there, 32}, {gone, 32}}), 0, 64},
      {"the kernel's", kPage, World::pieces({{uint64_t{0xffff'8000} << 32, kPage}}), 0, 64},
      {"no address that there is", kPage, World::pieces({{uint64_t{1} << 62, kPage}}), 0, 64},
      {"the first page", kPage, World::pieces({{8, kPage}}), 0, 64},
      {"2^60 bytes, the middle of them", kHuge, World::pieces({{there, kHuge}}), kHuge / 2, 64},
      {"behind the end of what was shown", kPage, World::pieces({{there, kPage}}), kPage - 63, 64},
      {"far behind it", kPage, World::pieces({{there, kPage}}), kFar - 32, 64},
      {"more bytes than all of it", kPage, World::pieces({{there, kPage}}), 0, 6000},
  };
  for (const Lie& lie : lies) {
    INFO(lie.what);
    World world;
    world.show(lie.nbytes, lie.pieces);
    CHECK(world.write(lie.source, lie.span_nbytes, 5000) == Slot::kRefused);
    CHECK_FALSE(world.host.is_lost());
    // The connection goes on: other memory, shown honestly in its place.
    world.peer.announce(2, kTheirRegion, 0, {}, {});
    world.show(kPage, World::pieces({{there, kPage}}));
    world.peer.make_it_read_the_socket();
    CHECK(world.write(0, 64) == Slot::kAccepted);
    // A target that was not granted stays one, whatever the source.
    CHECK(world.write(0, 64, 4090) == Slot::kRefused);
    CHECK_FALSE(world.host.is_lost());
  }
}

TEST_CASE("what cannot be the pieces of a region, or words, ends the connection") {
  const TheirMemory memory;
  const uint64_t there = memory.at(0);
  const int fd = ::memfd_create("kvxfer-test", MFD_CLOEXEC);
  const Fd owned(fd);
  const std::span<const int> none, one(&fd, 1);
  Bytes too_many;
  for (int i = 0; i < 1001; ++i) {
    const Bytes each = World::pieces({{there, 1}});
    too_many.insert(too_many.end(), each.begin(), each.end());
  }
  Bytes cut = World::pieces({{there, 64}});
  cut.pop_back();
  struct Shown {
    std::string what;
    uint64_t nbytes;
    Bytes bytes;
    std::span<const int> fds;
  };
  const Shown regions[] = {
      {"no pieces", 64, {}, none},
      {"no pieces of no bytes", 0, {}, none},
      {"a byte too few", 64, cut, none},
      {"less than the region has", 65, World::pieces({{there, 64}}), none},
      {"more", 63, World::pieces({{there, 64}}), none},
      {"an empty piece", 64, World::pieces({{there, 0}, {there, 64}}), none},
      {"a sum of 2^64 and more", 64, World::pieces({{there, kFar}, {there, 65}}), none},
      {"a piece at nothing", 64, World::pieces({{0, 64}}), none},
      {"a piece round the end", 64, World::pieces({{kFar - 32, 64}}), none},
      {"1001 pieces", 1001, too_many, none},
      {"a descriptor beside them", 64, World::pieces({{there, 64}}), one},
  };
  for (const Shown& shown : regions) {
    INFO(shown.what);
    World world;
    world.show(shown.nbytes, shown.bytes, shown.fds);
    CHECK(world.write(0, 1) != Slot::kAccepted);
    CHECK(world.host.is_lost());
  }
  const Bytes address = World::pieces({{there, 0}});
  const ByteView word = ByteView(address).first(8);
  const Shown words[] = {
      {"no address", 0, {}, none},
      {"7 bytes of one", 0, {word.begin(), word.begin() + 7}, none},
      {"two", 0, address, none},
      {"nothing", 0, Bytes(8), none},
      {"a descriptor", 0, {word.begin(), word.end()}, one},
  };
  for (const Shown& shown : words) {
    INFO("words: ", shown.what);
    World world;
    world.show_words(shown.bytes, shown.fds);
    world.peer.make_it_read_the_socket();
    CHECK(world.host.is_lost());
  }
  World world;
  world.show_words(word);
  world.peer.make_it_read_the_socket();
  CHECK_FALSE(world.host.is_lost());
  world.show_words(word);  // readers look there already
  world.peer.make_it_read_the_socket();
  CHECK(world.host.is_lost());
}

TEST_CASE("bytes of a process that is not the peer any more are not accepted") {
  World world;
  world.show(kPage, World::pieces({{world.memory.at(0), kPage}}));
  CHECK(world.write(0, 64) == Slot::kAccepted);
  world.word[0] ^= std::byte{1};
  CHECK(world.write(0, 64) == Slot::kRefused);
  CHECK(world.read());
  world.grant(3);
  CHECK(world.host.is_quiet(0));  // it has failed: ended() has looked at how
  world.word[0] ^= std::byte{1};
  CHECK(world.write(0, 64) == Slot::kAccepted);
}

TEST_CASE("answers to reads that nobody asked for, or of what was not shown, end the connection") {
  const auto broken = [](auto&& say, bool shown = true) {
    World world;
    if (shown) world.show(kPage, World::pieces({{world.memory.at(0), kPage}}));
    REQUIRE(world.read());
    say(world);
    world.poll();
    return world.host.is_lost();
  };
  CHECK_FALSE(broken([](World& w) { w.grant(3); }));  // as it should be
  CHECK_FALSE(
      broken([](World& w) { w.grant(3, {1, 1}); }));         // of a request that has ended, perhaps
  CHECK_FALSE(broken([](World& w) { w.grant(3); }, false));  // withdrawn meanwhile, perhaps
  CHECK(broken([](World& w) { w.grant(3, {kNumSlots, 1}); }));
  CHECK(broken([](World& w) { w.grant(4); }));
  CHECK(broken([](World& w) { w.grant(0); }));
  CHECK(broken([](World& w) { w.grant(kFar); }));
  CHECK(broken([](World& w) { w.grant(1), w.grant(1); }));
  CHECK(broken([](World& w) {  // of a region that ends before the spans do
    w.peer.announce(2, kTheirRegion, 0, {}, {});
    w.show(95, World::pieces({{w.memory.at(0), 95}}));
    w.grant(3);
  }));
  const auto outcome = [](uint32_t slot) { return OutcomeHead{{slot, 1}, 0, 0, 0, kNoSpan, 0, 0}; };
  CHECK(broken([&](World& w) { w.peer.message(Type::kOutcome, {view_of(outcome(kNumSlots))}); }));
  const StageHead data{{0, 1}, 0, 97};
  CHECK(broken([&](World& w) { w.peer.bulk(Type::kReadData, {view_of(data)}); }));
  const PartHead done{{0, 1}, 0};
  CHECK(broken([&](World& w) { w.peer.message(Type::kReadDone, {view_of(done)}); }));
  CHECK(broken([&](World& w) { w.peer.message(Type{99}, {view_of(done)}); }));
}

TEST_CASE("a read of memory or words that are not there fails once, and the next one is served") {
  const TheirMemory away;
  const uint64_t gone = away.at(kPage);
  const auto fails = [](uint64_t address, uint64_t words, WordRef region, WordRef lease) {
    World world;
    world.show(kPage, World::pieces({{address, kPage}}));
    if (words != 0) {
      const Bytes at = World::pieces({{words, 0}});
      world.show_words(ByteView(at).first(8));
    }
    REQUIRE(world.read());
    world.grant(3, {0, 1}, region, lease);
    CHECK(world.host.is_quiet(0));
    CHECK_FALSE(world.host.is_lost());
    const bool failed = world.peer.connection().counters.bytes_read.load() == 0;
    world.peer.hear();
    REQUIRE(world.read());
    world.peer.message(Type::kOutcome, {view_of(OutcomeHead{{0, 2}, 5, 0, 0, kNoSpan, 0, 0})});
    world.poll();
    CHECK(world.host.is_quiet(1));
    return failed;
  };
  const uint64_t there = away.at(0);
  uint64_t value = 0;  // of their words: bytes of kTheirs
  std::memset(&value, static_cast<int>(fuzz::kTheirs), sizeof value);
  const WordRef open{0, 0, value}, closed{0, 0, value + 1}, unknown{ExportedWords::kNum, 0, value};
  CHECK_FALSE(fails(there, there, open, open));
  CHECK(fails(gone, 0, {}, {}));
  CHECK(fails(there, there, closed, {}));
  CHECK(fails(there, there, {}, closed));
  CHECK(fails(there, there, unknown, {}));
  CHECK(fails(there, there, {}, unknown));
  CHECK(fails(there, gone, open, {}));
  CHECK(fails(there, kFar - 64, {WordRef::kNone - 1, 0, value}, {}));
  CHECK(fails(there, kFar, open, {}));
  CHECK(fails(there, 0, open, {}));  // never shown
}

TEST_CASE("a peer that unmaps its memory and changes its word while we read harms itself alone") {
  std::minstd_rand random(5);
  for (int round = 0; round < 20; ++round) {
    const Segment control = make_shared("kvxfer-test-control", sizeof(Control));
    World world(control.mapping);
    world.show(2 * kPage, World::pieces({{world.memory.at(0), 2 * kPage}}));
    std::atomic<bool> stop{false};
    std::thread other([&, seed = random()] {
      std::minstd_rand dice(seed);
      // Not a store that a sanitizer sees: no load of ours in this process ever meets it.
      for (uint64_t* word = reinterpret_cast<uint64_t*>(world.word.data());
           !stop.load(std::memory_order_relaxed);) {
        world.memory.show_second(dice() % 2 == 0);
        std::atomic_ref(*word).store(dice() % 4 == 0 ? 0 : 7, std::memory_order_relaxed);
      }
    });
    int accepted = 0, refused = 0;
    for (uint32_t i = 0; i < 300; ++i) {
      const Slot end = world.write(i % 2 == 0 ? 0 : kPage - 32, 64, i * 8);
      CHECK((end == Slot::kAccepted || end == Slot::kRefused));
      ++(end == Slot::kAccepted ? accepted : refused);
      if (i % 32 == 0 && world.read()) world.grant(3, {0, i / 32 + 1});
    }
    stop.store(true);
    other.join();
    CHECK(accepted + refused == 300);
    CHECK_FALSE(world.host.is_lost());
    // What it could not stop is over: an honest one is taken.
    world.memory.show_second(true);
    world.word = {std::byte{7}};
    CHECK(world.write(kPage - 32, 64) == Slot::kAccepted);
  }
}
