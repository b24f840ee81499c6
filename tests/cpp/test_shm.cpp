// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Shared memory between processes that do not trust each other: rings, seals, descriptors over
// sockets.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "common/error.hpp"
#include "common/random.hpp"
#include "transport/shm/channel.hpp"
#include "transport/shm/ring.hpp"
#include "transport/shm/segment.hpp"
#include "transport/shm/unix_socket.hpp"

using namespace kvxfer;
using namespace kvxfer::shm;

namespace {

constexpr uint64_t kCapacity = 1024;

struct TestRing {
  RingHead head{};
  alignas(8) std::byte data[kCapacity]{};
  RingProducer producer;
  RingConsumer consumer;
  TestRing() {
    producer.attach(&head, data, kCapacity);
    consumer.attach(&head, data, kCapacity);
  }
  bool push(uint32_t type, ByteView body) { return producer.push(type, {&body, 1}); }
};

Bytes pattern(size_t n, uint32_t seed) {
  Bytes bytes(n);
  std::minstd_rand random(seed + 1);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace

TEST_CASE("records come out whole and in order, across the ring's end") {
  TestRing ring;
  uint32_t next_in = 0, next_out = 0;
  std::minstd_rand random(7);
  Bytes body;
  uint32_t type = 0;
  while (next_out < 5000) {
    while (ring.push(next_in, pattern(next_in * 37 % 400, next_in))) ++next_in;
    for (uint32_t n = 1 + static_cast<uint32_t>(random()) % 4; n > 0 && next_out < next_in; --n) {
      REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
      CHECK(type == next_out);
      CHECK(body == pattern(next_out * 37 % 400, next_out));
      ring.consumer.release();
      ++next_out;
    }
  }
}

TEST_CASE("a full ring refuses a push, and the consumer learns that somebody waits") {
  TestRing ring;
  while (ring.push(1, pattern(100, 0))) {
  }
  uint32_t type = 0;
  Bytes body;
  REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
  CHECK(ring.consumer.release());  // true: ring the producer's bell
  CHECK(ring.push(1, pattern(100, 0)));
}

TEST_CASE("the consumer does not fall asleep over a record, and is rung once") {
  TestRing ring;
  REQUIRE(ring.consumer.prepare_sleep());
  REQUIRE(ring.push(1, {}));
  CHECK(ring.producer.must_ring());
  CHECK_FALSE(ring.producer.must_ring());
  CHECK_FALSE(ring.consumer.prepare_sleep());
}

TEST_CASE("reading up to a mark ends there, though the producer refills or lies") {
  TestRing ring;
  uint32_t type = 0;
  Bytes body;
  // Across the ring's end, too: 5 records of 72 bytes at a time in a ring of 1024.
  for (int round = 0; round < 40; ++round) {
    for (int i = 0; i < 5; ++i) REQUIRE(ring.push(1, pattern(64, 0)));
    const uint64_t end = ring.consumer.end();
    int taken = 0;
    while (ring.consumer.is_before(end) && ring.consumer.peek(type, body) == Pop::kRecord) {
      ring.consumer.release();
      REQUIRE(type == 1);
      ++taken;
      REQUIRE(ring.push(2, pattern(64, 0)));  // it used to be read as long as this went on
    }
    CHECK(taken == 5);
    for (int i = 0; i < 5; ++i) {
      REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
      REQUIRE(type == 2);
      ring.consumer.release();
    }
  }
  const uint64_t honest = ring.head.tail.load();
  ring.head.tail.store(honest + (uint64_t{1} << 40));
  const uint64_t end = ring.consumer.end();
  ring.head.tail.store(honest);
  CHECK(end <= honest + kCapacity);
}

TEST_CASE("the longest body fits into an empty ring wherever its end stands") {
  for (size_t offset = 0; offset < kCapacity; offset += 8) {
    TestRing ring;
    uint32_t type = 0;
    Bytes body;
    for (size_t done = 0; done < offset; done += 8) {  // 8 bytes a record: the head alone
      REQUIRE(ring.push(0, {}));
      REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
      ring.consumer.release();
    }
    const Bytes longest = pattern(RingProducer::max_body(kCapacity), 3);
    REQUIRE(ring.push(9, longest));
    REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
    CHECK(body == longest);
  }
}

TEST_CASE("a hostile producer cannot make the consumer read outside the ring") {
  std::minstd_rand random(11);
  Bytes body;
  uint32_t type = 0;
  for (int round = 0; round < 20000; ++round) {
    TestRing ring;
    fill_random(std::span(ring.data));
    // Small numbers now and then, so that some records look plausible.
    if (round % 2 == 0) {
      const uint32_t nbytes = static_cast<uint32_t>(random()) % 2048;
      std::memcpy(ring.data, &nbytes, sizeof(nbytes));
    }
    ring.head.tail.store(round % 3 == 0 ? random() : random() % (2 * kCapacity));
    for (int n = 0; n < 200; ++n) {
      const Pop pop = ring.consumer.peek(type, body);
      if (pop != Pop::kRecord) break;
      CHECK(body.size() <= kCapacity);
      ring.consumer.release();
    }
  }
}

TEST_CASE("a hostile consumer cannot make the producer overwrite what was not read") {
  TestRing ring;
  ring.head.head.store(uint64_t{1} << 40);
  // It is looked at when the ring is full by the producer's own count, and not before.
  size_t pushed = 0;
  while (pushed <= kCapacity && ring.push(1, pattern(10, 0))) ++pushed;
  CHECK(pushed == kCapacity / 24);  // 8 of the head, 10 bytes, aligned to 8
  CHECK(ring.producer.broken());
  Bytes body;
  uint32_t type = 0;
  for (size_t i = 0; i < pushed; ++i) {
    REQUIRE(ring.consumer.peek(type, body) == Pop::kRecord);
    CHECK(body == pattern(10, 0));
    ring.consumer.release();
  }
}

TEST_CASE("two threads: nothing is lost, nobody sleeps for ever") {
  TestRing ring;
  constexpr uint32_t kCount = 20000;
  const Fd consumer_bell(::eventfd(0, 0)), producer_bell(::eventfd(0, 0));
  const auto ring_bell = [](const Fd& bell) {
    const uint64_t one = 1;
    REQUIRE(::write(bell.get(), &one, sizeof one) == sizeof one);
  };
  const auto wait_bell = [](const Fd& bell) {
    uint64_t count;
    REQUIRE(::read(bell.get(), &count, sizeof count) == sizeof count);
  };
  std::thread producer([&] {
    for (uint32_t i = 0; i < kCount;) {
      if (ring.push(i, pattern(i % 200, i))) {
        ++i;
        if (ring.producer.must_ring()) ring_bell(consumer_bell);
      } else {
        wait_bell(producer_bell);
      }
    }
  });
  Bytes body;
  uint32_t type = 0;
  for (uint32_t i = 0; i < kCount;) {
    switch (ring.consumer.peek(type, body)) {
      case Pop::kEmpty:
        if (ring.consumer.prepare_sleep()) wait_bell(consumer_bell);
        break;
      case Pop::kRecord:
        CHECK(type == i);
        CHECK(body == pattern(i % 200, i));
        if (ring.consumer.release()) ring_bell(producer_bell);
        ++i;
        break;
      case Pop::kBroken:
        FAIL("broken");
    }
  }
  producer.join();
}

TEST_CASE("a peer can map our memory to read, and in no way write, shrink or grow it") {
  const Segment segment = make_owned("test", 8192);
  std::string reason;
  const auto mapped = map_peer_readonly(segment.fd.get(), 8192, reason);
  REQUIRE_MESSAGE(mapped, reason);
  segment.mapping->data()[5] = std::byte{42};
  CHECK(mapped->data()[5] == std::byte{42});

  const int fd = segment.fd.get();
  CHECK(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
  CHECK(::mprotect(mapped->data(), 4096, PROT_READ | PROT_WRITE) != 0);
  CHECK(::write(fd, "x", 1) < 0);
  CHECK(::ftruncate(fd, 0) != 0);
  CHECK(::ftruncate(fd, 1 << 20) != 0);
  CHECK(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
}

TEST_CASE("memory that could shrink under us is refused") {
  const Fd loose(::memfd_create("loose", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(loose.get(), 8192) == 0);
  std::string reason;
  CHECK_FALSE(map_peer_readonly(loose.get(), 8192, reason));
  CHECK(reason.find("seals") != std::string::npos);

  const Segment small = make_owned("small", 4096);
  CHECK_FALSE(map_peer_readonly(small.fd.get(), 8192, reason));
  CHECK(reason.find("smaller") != std::string::npos);
}

TEST_CASE("descriptors cross a Unix socket; more than expected are closed and refused") {
  const std::string name = "kvxfer-test-" + hex(random_bytes<8>());
  const Fd listener = listen_abstract(name);
  int err = 0;
  const Fd client = connect_abstract(name, err);
  REQUIRE(client);
  const Fd server(::accept(listener.get(), nullptr, nullptr));
  REQUIRE(server);
  CHECK(peer_uid(server.get()) == ::getuid());

  const Segment segment = make_owned("sent", 4096);
  const int fds[2] = {segment.fd.get(), segment.fd.get()};
  Bytes message;
  std::vector<Fd> received;
  REQUIRE(send(client.get(), as_bytes_view("hello"), {fds, 1}));
  REQUIRE(receive(server.get(), message, received, 1) == Received::kMessage);
  CHECK(message.size() == 5);
  REQUIRE(received.size() == 1);
  std::string reason;
  CHECK(map_peer_readonly(received[0].get(), 4096, reason));

  REQUIRE(send(client.get(), as_bytes_view("two"), {fds, 2}));
  CHECK(receive(server.get(), message, received, 1) == Received::kBroken);
  CHECK(received.empty());

  CHECK_FALSE(connect_abstract(name + "-nobody", err));
  CHECK(err == ECONNREFUSED);
}

TEST_CASE("staging slots come back in order and wake the side that waits for one") {
  Segment control = make_shared("control", sizeof(Control));
  Segment staging_a = make_owned("a", kStageBytes), staging_b = make_owned("b", kStageBytes);
  std::string reason;
  const auto a_seen_by_b = map_peer_readonly(staging_a.fd.get(), kStageBytes, reason);
  const auto b_seen_by_a = map_peer_readonly(staging_b.fd.get(), kStageBytes, reason);
  const int bell_a = ::eventfd(0, EFD_NONBLOCK), bell_b = ::eventfd(0, EFD_NONBLOCK);
  Channel a(control.mapping, 0, std::move(staging_a), b_seen_by_a, Fd(::dup(bell_a)), Fd(bell_b));
  Channel b(control.mapping, 1, std::move(staging_b), a_seen_by_b, Fd(::dup(bell_b)), Fd(bell_a));

  const Bytes record = pattern(16, 1);
  uint32_t filled = 0;
  while (std::byte* slot = a.stage()) {
    std::memset(slot, static_cast<int>(filled), 64);
    REQUIRE(a.bulk(Type::kStaged, {record}));
    a.stage_used();
    ++filled;
  }
  CHECK(filled == kNumStageSlots);
  a.hear_bell();
  uint32_t type = 0;
  Bytes body;
  REQUIRE(b.peek_bulk(type, body) == Pop::kRecord);
  CHECK(b.peer_stage(0)[0] == std::byte{0});
  CHECK(b.peer_stage(31)[0] == std::byte{31});
  const auto first = b.take_stage(), second = b.take_stage();
  REQUIRE(second);
  b.release_bulk();
  b.return_stage(*second);  // out of order: waits for the first
  CHECK(a.stage() == nullptr);
  b.return_stage(*first);
  uint64_t count = 0;
  CHECK(::read(a.bell(), &count, sizeof count) == sizeof count);  // rung
  CHECK(a.stage() != nullptr);
}
