// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Reads that the reader does by itself, and the words that tell it when the memory was taken back.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "common/hooks.hpp"
#include "common/racy_copy.hpp"
#include "engine/engine.hpp"
#include "transport/cma/peer.hpp"
#include "transport/exported_words.hpp"
#include "transport/shm/peer_memory.hpp"

using namespace kvxfer;

namespace {

bool all_equal(const std::byte* data, size_t nbytes, int value) {
  return data[0] == std::byte(value) && std::memcmp(data, data + 1, nbytes - 1) == 0;
}

bool usable(const std::string& transport) {
  for (auto& each : probe_transports())
    if (each.name == transport) {
      if (each.reason) MESSAGE("skipped: ", transport, ": ", *each.reason);
      return !each.reason;
    }
  return false;
}

struct Pair {
  static constexpr int64_t kBytes = 4 << 20;
  std::shared_ptr<Engine> reader, owner;
  RegionPtr into, from;
  PeerPtr peer;

  explicit Pair(const std::string& transport) {
    EngineOptions options;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {transport};
    reader = Engine::create(options);
    owner = Engine::create(options);
    into = reader->allocate(kBytes, {.name = "into"});
    from = owner->allocate(kBytes, {.name = "from"});
    peer = reader->connect(owner->address(), 10);
  }
  ~Pair() {
    reader->close();
    owner->close();
  }
  LeasePtr grant() {
    const int64_t offset = 0, nbytes = kBytes;
    return owner->grant(from, {&offset, 1, true}, {&nbytes, 1, true}, 60, {}, 0);
  }
  TransferPtr read(const LeasePtr& lease) {
    const int64_t zero = 0, nbytes = kBytes;
    SubmitOptions options;
    options.deadline_ns = deadline_after(30);
    if (lease) options.has_lease = true, options.lease = lease->token;
    return reader->submit(
        Op::kRead, into, reader->regions_of(*peer).at("from"),
        SpanArguments{{&zero, 1, true}, {&zero, 1, true}, {&nbytes, 1, true}, {}, false},
        std::move(options));
  }
};

}  // namespace

TEST_CASE("a word is open until it is closed, and its index never means an old one") {
  auto words = std::make_shared<ExportedWords>();
  ExportedWord first = words->take();
  REQUIRE(first);
  const WordRef old = first.ref();
  CHECK(still_open(words->base(), old));
  first.close();
  CHECK_FALSE(still_open(words->base(), old));
  {
    ExportedWord gone = std::move(first);
  }
  ExportedWord second = words->take();
  CHECK(second.ref().index == old.index);
  CHECK(second.ref().value != old.value);
  CHECK_FALSE(still_open(words->base(), old));
  words->take().close();  // another's end is not ours
  CHECK(still_open(words->base(), second.ref()));
  CHECK_FALSE(still_open(words->base(), {ExportedWords::kNum, 0, 0}));
  CHECK_FALSE(still_open(words->base(), {}));
}

TEST_CASE("a gate that is quiet is closed to readers elsewhere, and a second close harms nobody") {
  auto words = std::make_shared<ExportedWords>();
  WordRef seen;
  {
    Gate gate;
    gate.export_word(words->take());
    seen = gate.word().ref();
    gate.close();
    CHECK(gate.quiet());
    CHECK_FALSE(still_open(words->base(), seen));
    gate.close();
  }
  Gate next;
  next.export_word(words->take());
  CHECK(next.word().ref().index == seen.index);
  CHECK(still_open(words->base(), next.word().ref()));
}

TEST_CASE("when all words are in use there is none, and one that comes back is used again") {
  auto words = std::make_shared<ExportedWords>();
  std::vector<ExportedWord> all;
  for (uint32_t i = 0; i < ExportedWords::kNum; ++i) all.push_back(words->take());
  CHECK(all.back());
  CHECK_FALSE(words->take());
  all.pop_back();
  CHECK(words->take());
}

TEST_CASE("a reader that finds the word open has copied nothing that was stored after its close") {
  auto words = std::make_shared<ExportedWords>();
  constexpr size_t kBytes = 64 * 1024;
  constexpr int kRounds = 300;
  std::vector<std::byte> memory(kBytes), copy(kBytes);
  std::atomic<int> round{0};  // release: the word and the bytes of this round
  WordRef refs[kRounds + 1];
  std::atomic<uint64_t> num_open{0}, num_wrong{0};
  std::thread reader([&] {
    for (int now; (now = round.load(std::memory_order_acquire)) <= kRounds;) {
      if (now == 0) continue;
      racy_copy(copy.data(), memory.data(), kBytes);
      if (!still_open(words->base(), refs[now])) continue;
      ++num_open;
      num_wrong += !all_equal(copy.data(), kBytes, now % 200);
    }
  });
  for (int i = 1; i <= kRounds; ++i) {
    std::memset(memory.data(), i % 200, kBytes);
    ExportedWord word = words->take();
    refs[i] = word.ref();
    round.store(i, std::memory_order_release);
    const uint64_t before = num_open;
    while (num_open < before + 2) std::this_thread::yield();
    word.close();
    std::memset(memory.data(), 0xee, kBytes);  // reused at once
  }
  round = kRounds + 1;
  reader.join();
  CHECK(num_wrong == 0);
}

namespace {
std::atomic<int> parked{0};  // 1: a reader is inside its chunk; 2: it may go on
void park(hooks::Point point) {
  int none = 0;
  if (point != hooks::Point::kInsideRead || !parked.compare_exchange_strong(none, 1)) return;
  while (parked != 2) std::this_thread::yield();
}
}  // namespace

TEST_CASE("revoke does not wait for a reader that stands inside its chunk, and the read fails") {
  for (const char* transport : {"shm", "cma"}) {
    if (!usable(transport)) continue;
    for (const bool lease : {true, false}) {
      CAPTURE(transport);
      CAPTURE(lease);
      Pair pair(transport);
      std::memset(pair.from->pieces[0].base, 0x55, Pair::kBytes);
      LeasePtr held = lease ? pair.grant() : nullptr;
      parked = 0;
      hooks::handler = park;
      TransferPtr read = pair.read(held);
      while (parked != 1) std::this_thread::yield();
      if (lease) {
        pair.owner->begin_revoke(held);
        CHECK(held->gate.quiet());
      } else {
        pair.owner->deregister(pair.from);
        CHECK(pair.from->gate.quiet());
      }
      std::memset(pair.from->pieces[0].base, 0xee, Pair::kBytes);
      parked = 2;
      REQUIRE(read->wait(deadline_after(30)) == Woken::kNotified);
      hooks::handler = nullptr;
      CHECK(read->state == State::kFailed);
      CHECK(read->failure.code == (lease ? Code::kLease : Code::kRemoteAccess));
      CHECK(read->quiesced);
    }
  }
}

TEST_CASE("a cancelled read is quiesced when its copier has left, and not before") {
  for (const char* transport : {"shm", "cma"}) {
    if (!usable(transport)) continue;
    CAPTURE(transport);
    Pair pair(transport);
    parked = 0;
    hooks::handler = park;
    TransferPtr read = pair.read(nullptr);
    while (parked != 1) std::this_thread::yield();
    pair.reader->cancel(read);
    CHECK(read->state == State::kCancelled);
    CHECK(read->agreed);
    CHECK_FALSE(read->quiesced);
    parked = 2;
    while (!read->quiesced) std::this_thread::yield();
    hooks::handler = nullptr;
    std::memset(pair.into->pieces[0].base, 7, Pair::kBytes);
    TransferPtr next = pair.read(nullptr);  // the slot and the rings are as they were
    REQUIRE(next->wait(deadline_after(30)) == Woken::kNotified);
    CHECK(next->state == State::kDone);
    CHECK(all_equal(pair.into->pieces[0].base, Pair::kBytes, 0));
  }
}

TEST_CASE("another process under the same pid is noticed, one that is gone too") {
  if (!usable("cma")) return;
  alignas(16) static Incarnation word{std::byte{1}};
  std::vector<std::byte> data(4096, std::byte{5}), into(4096);
  const auto address = reinterpret_cast<uint64_t>(word.data());
  const auto read = [&](const cma::Peer& peer, std::byte* from) {
    iovec local{into.data(), into.size()}, remote{from, into.size()};
    size_t done = 0;
    return peer.read({&local, 1}, {&remote, 1}, {}, done);
  };
  CHECK_FALSE(read(cma::Peer(::getpid(), address, word), data.data()));
  CHECK(into == data);

  const auto stranger = read(cma::Peer(::getpid(), address, Incarnation{}), data.data());
  REQUIRE(stranger);
  CHECK(stranger->code == Code::kPeerDisconnected);
  const auto elsewhere = read(cma::Peer(::getpid(), 16, word), data.data());
  REQUIRE(elsewhere);
  CHECK(elsewhere->code == Code::kPeerDisconnected);
  const auto unmapped =
      read(cma::Peer(::getpid(), address, word), reinterpret_cast<std::byte*>(16));
  REQUIRE(unmapped);
  CHECK(unmapped->code == Code::kRemoteAccess);
  CHECK(unmapped->err == EFAULT);

  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  const auto gone = read(cma::Peer(child, address, word), data.data());
  REQUIRE(gone);
  CHECK(gone->code == Code::kPeerDisconnected);
  CHECK(gone->err == ESRCH);
}
