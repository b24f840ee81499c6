// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A session, a transport that it may be joined by, and somebody else at the other end of the Unix
// socket. A message is what docs/wire_format.md says, so that both sides are held to it.
#pragma once

#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/hooks.hpp"
#include "common/random.hpp"
#include "common/sha256.hpp"
#include "engine/control.hpp"
#include "engine/engine.hpp"
#include "eventually.hpp"
#include "fuzz/handshake_host.hpp"
#include "fuzz/peer_host.hpp"
#include "transport/registry.hpp"
#include "transport/shm/control.hpp"
#include "transport/shm/unix_socket.hpp"
#include "transport/tcp/socket.hpp"

namespace kvxfer::join {

using namespace kvxfer::shm;

constexpr size_t kMaxJoining = 64;         // as in csrc/transport/shm/transport.cpp
constexpr size_t kMaxMessage = 32 * 1024;  // as in unix_socket.cpp
constexpr size_t kProofAt = 56;            // in a join

struct Join {  // then the introduction
  uint32_t version = kVersion, reserved = 0;
  Key session{};
  std::array<std::byte, 32> nonce = random_bytes<32>();
  Digest proof{};
};
struct Reply {  // then the reason
  uint32_t version = kVersion, refused = 0;
  Digest proof{};
};
static_assert(offsetof(Join, proof) == kProofAt && sizeof(Join) == 88 && sizeof(Reply) == 40);

template <typename T>
Bytes bytes_of(const T& value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  return {begin, begin + sizeof value};
}
inline Bytes operator+(Bytes a, ByteView b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
inline Bytes first(const Bytes& bytes, size_t n) {
  return {bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(n)};
}

inline Digest proof_of(const Session& session, std::string_view transport, std::string_view role,
                       const Join& join, ByteView introduction) {
  return hmac_sha256(session.key,
                     {as_bytes_view("kvxfer "), as_bytes_view(transport), as_bytes_view(" join "),
                      as_bytes_view(role), join.session, join.nonce, introduction});
}
inline Session make_session() {
  Session session{.id = random_bytes<16>(), .key = random_bytes<32>(), .peer = {}};
  session.peer.incarnation = random_bytes<16>();
  return session;
}

inline size_t num_open() {
  size_t num = 0;
  for ([[maybe_unused]] const auto& each : std::filesystem::directory_iterator("/proc/self/fd"))
    ++num;
  return num;
}

// The engine with one session that is being set up; its progress thread is the test.
class JoinHost final : public fuzz::PeerHost {
 public:
  JoinHost() {
    who.host.boot_id = "this boot";
    who.host.uid = ::getuid();
    who.incarnation = random_bytes<16>();
  }
  std::optional<Session> session(const Key& id) noexcept override {
    return id == ours.id ? std::optional(ours) : std::nullopt;
  }
  void adopt(const Key& id, std::shared_ptr<Connection> connection) override {
    FUZZ_CHECK(id == ours.id);
    adopted.push_back(std::move(connection));
  }
  void lost(Connection&, const Failure&) noexcept override { ++num_lost; }

  const Session ours = make_session();
  std::vector<std::shared_ptr<Connection>> adopted;
  size_t num_lost = 0;
};

struct World {
  explicit World(const std::string& name)
      : name(name), transport(make_transport(name, {})), word(host.ours.peer.incarnation) {
    REQUIRE_FALSE(transport->probe());
    transport->start(host);
  }
  ~World() {
    transport->stop();
    for (auto& each : host.adopted) each->close({.code = Code::kCancelled, .text = "the end"});
    rounds();
    CHECK(host.num_lost == host.adopted.size());
  }
  void rounds() {
    for (int i = 0; i < 8; ++i) host.reactor().round();
  }
  // What a peer says of itself: cma's tells where its incarnation is, which is here.
  Bytes introduction() const {
    return name == "cma" ? bytes_of(reinterpret_cast<uint64_t>(&word)) : Bytes{};
  }
  Bytes join(Join it, const Session& session, std::string_view transport_name,
             std::string_view role, ByteView introduction) const {
    it.session = session.id;
    it.proof = proof_of(session, transport_name, role, it, introduction);
    return bytes_of(it) + introduction;
  }
  Bytes good_join() const { return join({}, host.ours, name, "client", introduction()); }

  const std::string name;
  JoinHost host;
  std::unique_ptr<Transport> transport;
  alignas(16) const Incarnation word;
};

struct Heard {
  Received how = Received::kAgain;
  Bytes message;
  std::vector<Fd> fds;
  bool refused() const { return Reader(message).get<Reply>().refused != 0; }
  std::string text() const {
    const ByteView rest = ByteView(message).subspan(std::min(message.size(), sizeof(Reply)));
    return {reinterpret_cast<const char*>(rest.data()), rest.size()};
  }
};

// What either side hands over, beside the control segment.
struct Parts {
  Segment staging = make_owned("kvxfer-test-staging", kStageBytes);
  Fd bell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  std::vector<int> both() const { return {staging.fd.get(), bell.get()}; }
};

// Somebody who has found the socket.
class Stranger : public Parts {
 public:
  explicit Stranger(const Transport& transport) : Stranger(transport.offer()) {}
  explicit Stranger(const Bytes& offer) {
    Reader reader(offer);
    reader.u32(), reader.text(128);
    int err = 0;
    socket = connect_abstract(reader.text(96), err);
    REQUIRE(socket);
  }
  bool say(ByteView message, const std::vector<int>& fds) const {
    return send(socket.get(), message, fds);
  }
  Heard hear() const {
    Heard heard;
    heard.how = receive(socket.get(), heard.message, heard.fds, 8);
    return heard;
  }
  // Of an engine that has a thread of its own.
  Heard await() const {
    pollfd entry{socket.get(), POLLIN, 0};
    REQUIRE(::poll(&entry, 1, 20'000) > 0);
    return hear();
  }

  Fd socket;
};

inline void check_joins(World& world) {
  const size_t before = world.host.adopted.size();
  const Stranger peer(*world.transport);
  const Join join;
  REQUIRE(peer.say(world.join(join, world.host.ours, world.name, "client", world.introduction()),
                   peer.both()));
  world.rounds();
  const Heard heard = peer.hear();
  REQUIRE(heard.how == Received::kMessage);
  INFO(heard.text());
  CHECK_FALSE(heard.refused());
  CHECK(heard.fds.size() == 3);
  Join said = join;
  said.session = world.host.ours.id;
  CHECK(Reader(heard.message).get<Reply>().proof ==
        proof_of(world.host.ours, world.name, "server", said, world.introduction()));
  CHECK(world.host.adopted.size() == before + 1);
}

inline Fd loose_memfd(size_t nbytes) {
  Fd fd(::memfd_create("kvxfer-test-loose", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(nbytes)) == 0);
  return fd;
}

inline Bytes offer_of(ByteView offers, const std::string& transport) {
  const auto all = decode_offers(offers);
  for (const Offer& each : all.value())
    if (each.transport == transport) return each.data;
  FAIL("it is not offered");
  return {};
}

constexpr const char* kBoth[] = {"shm", "cma"};
constexpr char kNoSession[] = "names no session of ours, or does not prove";
constexpr char kMalformed[] = "a malformed join";

}  // namespace kvxfer::join
