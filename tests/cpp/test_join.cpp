// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Joining a session over a Unix socket, shm's and cma's, with somebody else at its other end: who
// does not prove that it belongs to the session gets nothing, and what it says or hands over is
// not kept. A message is what docs/wire_format.md says, so that both sides of ours are held to it.
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

using namespace kvxfer;
using namespace kvxfer::shm;

namespace {

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
Bytes operator+(Bytes a, ByteView b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
Bytes first(const Bytes& bytes, size_t n) {
  return {bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(n)};
}

Digest proof_of(const Session& session, std::string_view transport, std::string_view role,
                const Join& join, ByteView introduction) {
  return hmac_sha256(session.key,
                     {as_bytes_view("kvxfer "), as_bytes_view(transport), as_bytes_view(" join "),
                      as_bytes_view(role), join.session, join.nonce, introduction});
}
Session make_session() {
  Session session{.id = random_bytes<16>(), .key = random_bytes<32>(), .peer = {}};
  session.peer.incarnation = random_bytes<16>();
  return session;
}

size_t num_open() {
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

void check_joins(World& world) {
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

Fd loose_memfd(size_t nbytes) {
  Fd fd(::memfd_create("kvxfer-test-loose", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(nbytes)) == 0);
  return fd;
}

Bytes offer_of(ByteView offers, const std::string& transport) {
  const auto all = decode_offers(offers);
  for (const Offer& each : all.value())
    if (each.transport == transport) return each.data;
  FAIL("it is not offered");
  return {};
}

constexpr const char* kBoth[] = {"shm", "cma"};
constexpr char kNoSession[] = "names no session of ours, or does not prove";
constexpr char kMalformed[] = "a malformed join";

}  // namespace

TEST_CASE("who does not prove that it belongs to a session is told so, and nothing of it is kept") {
  for (const std::string name : kBoth) {
    World world(name);
    const Session& ours = world.host.ours;
    const Bytes intro = world.introduction(), good = world.good_join();
    Session wrong_key = ours, unknown = ours;
    wrong_key.key[31] ^= std::byte{1};
    unknown.id[0] ^= std::byte{1};
    const auto with = [&](size_t at, uint8_t flip) {
      Bytes out = good;
      out[at] ^= std::byte{flip};
      return out;
    };
    const std::string other = name == "shm" ? "cma" : "shm";
    const auto bare = [&](const Bytes& introduction) {
      return world.join({}, ours, name, "client", introduction);
    };
    const Incarnation not_it = random_bytes<16>();
    const Fd loose = loose_memfd(kStageBytes), event(::eventfd(0, EFD_CLOEXEC));
    const Segment small = make_owned("kvxfer-test-small", kStageBytes - 1);
    int pipe[2];
    REQUIRE(::pipe2(pipe, O_CLOEXEC) == 0);
    const Fd ends[2] = {Fd(pipe[0]), Fd(pipe[1])};
    const Stranger lender(*world.transport);  // says nothing itself
    const int staging = lender.staging.fd.get(), bell = lender.bell.get();
    const std::vector<int> parts = {staging, bell};
    struct Lie {
      std::string what;
      Bytes said;
      std::vector<int> fds;
      const char* answer;  // null: hung up on without a word
    };
    std::vector<Lie> lies = {
        {"another key", world.join({}, wrong_key, name, "client", intro), parts, kNoSession},
        {"an unknown session", world.join({}, unknown, name, "client", intro), parts, kNoSession},
        {"no session", world.join({}, {.peer = {}}, name, "client", intro), parts, kNoSession},
        {"the server's proof", world.join({}, ours, name, "server", intro), parts, kNoSession},
        {"a proof for another way", world.join({}, ours, other, "client", intro), parts,
         kNoSession},
        {"no proof", with(kProofAt, 1), parts, kNoSession},
        {"a proof that ends wrongly", with(kProofAt + 31, 0x80), parts, kNoSession},
        {"a proof of another nonce", with(24, 1), parts, kNoSession},
        {"a proof of another introduction", good + Bytes(1), parts, kNoSession},
        {"another version", with(0, 1), parts, kMalformed},
        {"one byte", first(good, 1), parts, kMalformed},
        {"half of it", first(good, sizeof(Join) / 2), parts, kMalformed},
        {"a byte too few", first(good, sizeof(Join) - 1), parts, kMalformed},
        {"nothing at all", {}, {}, nullptr},
        {"more than a message can have", good + Bytes(kMaxMessage), parts, nullptr},
        {"as much as a message can have", good + Bytes(kMaxMessage - good.size()), parts,
         kNoSession},
        {"no descriptors", good, {}, kMalformed},
        {"one descriptor", good, {staging}, kMalformed},
        {"three descriptors", good, {staging, bell, bell}, nullptr},
        {"eight descriptors", good, std::vector<int>(8, bell), nullptr},
        {"a malformed introduction", bare(Bytes(name == "shm" ? 1 : 7)), parts,
         "a malformed introduction"},
        {"a long introduction", bare(Bytes(9)), parts, "a malformed introduction"},
        {"staging that is not sealed", good, {loose.get(), bell}, "lacks seals"},
        {"staging that is too small", good, {small.fd.get(), bell}, "smaller than announced"},
        {"staging that is no memory", good, {event.get(), bell}, "not a memfd"},
        {"a bell that is memory", good, {staging, loose.get()}, "no event descriptor"},
        {"a bell that is a pipe", good, {staging, ends[1].get()}, "no event descriptor"},
        {"a bell that is a socket", good, {staging, lender.socket.get()}, "no event descriptor"},
    };
    if (name == "cma") {
      const auto at = [&](uint64_t address) { return bare(bytes_of(address)); };
      for (const uint64_t nowhere :
           {uint64_t{0}, uint64_t{8}, ~uint64_t{0}, uint64_t{0xffff} << 48})
        lies.push_back({"an incarnation that is nowhere", at(nowhere), parts, "not the peer's"});
      lies.push_back({"another's incarnation", at(reinterpret_cast<uint64_t>(&not_it)), parts,
                      "another incarnation"});
    }
    world.rounds();  // the lender is in
    for (const Lie& lie : lies) {
      INFO(name, ": ", lie.what);
      const size_t before = num_open();
      {
        const Stranger stranger(*world.transport);
        REQUIRE(stranger.say(lie.said, lie.fds));
        world.rounds();
        if (lie.answer != nullptr) {
          const Heard heard = stranger.hear();
          REQUIRE(heard.how == Received::kMessage);
          INFO(heard.text());
          CHECK(heard.refused());
          CHECK(heard.fds.empty());
          CHECK(heard.text().find(lie.answer) != std::string::npos);
          CHECK(Reader(heard.message).get<Reply>().proof == Digest{});
        }
        CHECK(stranger.hear().how == Received::kClosed);
      }
      CHECK(world.host.adopted.empty());
      CHECK(num_open() == before);
    }
    check_joins(world);
  }
}

TEST_CASE("a client of another user is hung up on, whatever it says") {
  for (const std::string name : kBoth) {
    World world(name);
    world.host.who.host.uid = ::getuid() + 1;
    const Stranger stranger(*world.transport);
    stranger.say(world.good_join(), stranger.both());
    world.rounds();
    CHECK(stranger.hear().how == Received::kClosed);
    CHECK(world.host.adopted.empty());
    world.host.who.host.uid = ::getuid();
    check_joins(world);
  }
}

TEST_CASE("clients that say nothing cost a socket each, of a bounded number, for a bounded time") {
  World world("shm");
  std::vector<std::unique_ptr<Stranger>> silent;
  while (silent.size() < kMaxJoining - 1)
    silent.push_back(std::make_unique<Stranger>(*world.transport));
  world.rounds();
  check_joins(world);  // beside them
  silent.push_back(std::make_unique<Stranger>(*world.transport));
  world.rounds();
  const Stranger one_too_many(*world.transport);
  world.rounds();
  CHECK(one_too_many.hear().how == Received::kClosed);
  for (const auto& each : silent) CHECK(each->hear().how == Received::kAgain);
  hooks::skipped_ns.fetch_add(static_cast<int64_t>(kReadyTimeoutS * 1e9));
  world.rounds();
  for (const auto& each : silent) {
    const Heard heard = each->hear();
    CHECK(heard.refused());
    CHECK(heard.text() == "no join came within 10 s");
    CHECK(each->hear().how == Received::kClosed);
  }
  check_joins(world);
}

// The engine decides here: who could join as often as it likes would have its descriptors.
TEST_CASE("a join that is said again is refused, while the session is set up and after it") {
  for (const std::string name : kBoth) {
    EngineOptions options;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {name};
    const auto engine = Engine::create(options);
    // A peer that knows the secret, up to where it would say READY.
    fuzz::HandshakeHost host;
    tcp::TcpTransport transport(host, options.secret, {});
    const Patience patience(deadline_after(20));
    const auto session =
        transport.connect(engine->address(), patience, [](const PeerIdentity&) { return true; });
    const Session& ours = session.connection->session();
    alignas(16) const Incarnation word = host.self().incarnation;
    const Bytes introduction =
        name == "cma" ? bytes_of(reinterpret_cast<uint64_t>(&word)) : Bytes{};
    const Bytes offer = offer_of(session.offers, name);
    Join join;
    join.session = ours.id;
    join.proof = proof_of(ours, name, "client", join, introduction);
    const Bytes said = bytes_of(join) + introduction;
    const Stranger peer(offer);
    REQUIRE(peer.say(said, peer.both()));
    CHECK_FALSE(peer.await().refused());
    const size_t before = num_open();
    for (int i = 0; i < 8; ++i) {
      const Stranger again(offer);
      REQUIRE(again.say(said, again.both()));
      while (again.await().how == Received::kMessage) {
      }
    }
    CHECK(eventually_within(10, [&] { return num_open() <= before; }));
    pollfd alive{peer.socket.get(), POLLIN, 0};
    CHECK(::poll(&alive, 1, 0) == 0);  // the first one goes on
    // The session ends: whoever has kept the join cannot use it.
    engine->close();
    CHECK(peer.await().how != Received::kAgain);
    const auto next = Engine::create(options);
    const auto other =
        transport.connect(next->address(), patience, [](const PeerIdentity&) { return true; });
    const Stranger late(offer_of(other.offers, name));
    REQUIRE(late.say(said, late.both()));
    const Heard heard = late.await();
    CHECK(heard.refused());
    CHECK(heard.text().find(kNoSession) != std::string::npos);
    next->close();
  }
}

namespace {

// The other role: our side joins, and finds this behind the name that it was offered.
using Answer = std::function<void(int socket, const Bytes& join, const Parts& server)>;

std::string attach(World& world, const Answer& answer, double patience_s = 30) {
  const std::string name = "kvxfer-test-" + hex(random_bytes<8>());
  const Fd listener = listen_abstract(name);
  Bytes offer;
  Writer writer(offer);
  writer.u32(kVersion), writer.text("this boot"), writer.text(name);
  writer.raw(world.introduction());
  std::thread thread([&] {
    pollfd entry{listener.get(), POLLIN, 0};
    FUZZ_CHECK(::poll(&entry, 1, 20'000) > 0);
    const Fd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    Bytes join;
    std::vector<Fd> fds;
    FUZZ_CHECK(receive(socket.get(), join, fds, 2) == Received::kMessage && fds.size() == 2);
    answer(socket.get(), join, Parts());
  });
  const auto refusal =
      world.transport->attach(world.host.ours, offer, Patience(deadline_after(patience_s)));
  thread.join();
  return refusal.value_or("attached");
}

Reply reply_to(const World& world, const Bytes& said, std::string_view role = "server") {
  Reader reader(said);
  const auto join = reader.get<Join>();
  return {.proof =
              proof_of(world.host.ours, world.name, role, join, reader.take(reader.remaining()))};
}

}  // namespace

TEST_CASE("a server that does not prove itself, or hands over what cannot be used, is left") {
  for (const std::string name : kBoth) {
    World world(name);
    const Segment control = make_shared("kvxfer-test-control", sizeof(shm::Control)),
                  small = make_shared("kvxfer-test-small", sizeof(shm::Control) - 1);
    const Fd loose = loose_memfd(sizeof(shm::Control)), event(::eventfd(0, EFD_CLOEXEC));
    const int all = control.fd.get();
    const auto say = [](int socket, const Bytes& bytes, std::vector<int> fds) {
      FUZZ_CHECK(send(socket, bytes, fds));
    };
    // With the right proof, so of a peer.
    const auto hands = [&](std::function<std::vector<int>(const Parts&)> fds) -> Answer {
      return [&world, say, fds](int socket, const Bytes& join, const Parts& server) {
        say(socket, bytes_of(reply_to(world, join)), fds(server));
      };
    };
    const auto says = [&](std::function<Bytes(const Bytes&)> bytes) -> Answer {
      return [say, bytes, all](int socket, const Bytes& join, const Parts& server) {
        say(socket, bytes(join), {all, server.staging.fd.get(), server.bell.get()});
      };
    };
    struct Lie {
      std::string what;
      Answer answer;
      const char* refusal;
    };
    constexpr char kWrongProof[] = "its proof is wrong",
                   kBadAnswer[] = "answer to the join is malf";
    const Lie lies[] = {
        {"no proof", says([](const Bytes&) { return bytes_of(Reply{}); }), kWrongProof},
        {"our own proof", says([](const Bytes& join) {
           Reply reply;
           std::memcpy(reply.proof.data(), join.data() + kProofAt, sizeof reply.proof);
           return bytes_of(reply);
         }),
         kWrongProof},
        {"a client's proof",
         says([&](const Bytes& join) { return bytes_of(reply_to(world, join, "client")); }),
         kWrongProof},
        {"the proof of another join", says([&](const Bytes& join) {
           Bytes other = join;
           other[24] ^= std::byte{1};
           return bytes_of(reply_to(world, other));
         }),
         kWrongProof},
        {"a byte too few", says([&](const Bytes& join) {
           return first(bytes_of(reply_to(world, join)), sizeof(Reply) - 1);
         }),
         kBadAnswer},
        {"more than a message can have", says([&](const Bytes& join) {
           return bytes_of(reply_to(world, join)) + Bytes(kMaxMessage);
         }),
         kBadAnswer},
        {"no descriptors", hands([](const Parts&) { return std::vector<int>{}; }), kWrongProof},
        {"two", hands([&](const Parts& s) { return std::vector{all, s.bell.get()}; }), kWrongProof},
        {"four", hands([&](const Parts&) { return std::vector(4, all); }), kBadAnswer},
        {"a control segment that is too small", hands([&](const Parts& s) {
           return std::vector{small.fd.get(), s.staging.fd.get(), s.bell.get()};
         }),
         "smaller than announced"},
        {"one that is not sealed", hands([&](const Parts& s) {
           return std::vector{loose.get(), s.staging.fd.get(), s.bell.get()};
         }),
         "lacks seals"},
        {"one that is no memory", hands([&](const Parts& s) {
           return std::vector{event.get(), s.staging.fd.get(), s.bell.get()};
         }),
         "not a memfd"},
        {"staging that is not sealed",
         hands([&](const Parts& s) { return std::vector{all, loose.get(), s.bell.get()}; }),
         "lacks seals"},
        {"a bell that is memory",
         hands([&](const Parts& s) { return std::vector{all, s.staging.fd.get(), loose.get()}; }),
         "no event descriptor"},
    };
    for (const Lie& lie : lies) {
      INFO(name, ": ", lie.what);
      const size_t before = num_open();
      const std::string refusal = attach(world, lie.answer);
      INFO(refusal);
      CHECK(refusal.find(lie.refusal) != std::string::npos);
      CHECK(world.host.adopted.empty());
      CHECK(num_open() == before);
    }
    // What it says is shown as data, and no more of it than a line or two.
    const std::string loud = attach(world, says([](const Bytes&) {
                                      return bytes_of(Reply{.refused = 1}) +
                                             as_bytes_view("no\x1b[2J" + std::string(20'000, 'x'));
                                    }));
    CHECK(loud.starts_with("the peer refused the join: no?[2Jxxx"));
    CHECK(loud.size() < 300);
    // Nor is it waited for: half of the patience, and the rest is there for another transport.
    const std::string silent = attach(
        world,
        [](int socket, const Bytes&, const Parts&) {
          Bytes none;
          std::vector<Fd> fds;  // until our side has gone
          FUZZ_CHECK(receive(socket, none, fds, 2) == Received::kClosed);
        },
        0.2);
    CHECK(silent.find("did not answer the join within") != std::string::npos);
    const std::string gone = attach(
        world, [](int socket, const Bytes&, const Parts&) { ::shutdown(socket, SHUT_RDWR); });
    CHECK(gone.find("closed the Unix socket without an answer") != std::string::npos);
    CHECK(world.host.adopted.empty());
    CHECK(attach(world, hands([&](const Parts& s) {
                   return std::vector{all, s.staging.fd.get(), s.bell.get()};
                 })) == "attached");
    CHECK(world.host.adopted.size() == 1);
  }
}

TEST_CASE("an offer that lies about a cma peer is not joined") {
  World world("cma");
  const Incarnation not_it = random_bytes<16>();
  const std::string name = "kvxfer-test-" + hex(random_bytes<8>());
  const Fd listener = listen_abstract(name);
  const auto refusal = [&](ByteView introduction) {
    Bytes offer;
    Writer writer(offer);
    writer.u32(kVersion), writer.text("this boot"), writer.text(name), writer.raw(introduction);
    return world.transport->attach(world.host.ours, offer, Patience(deadline_after(30)))
        .value_or("attached");
  };
  const auto at = [&](const void* where) {
    return refusal(bytes_of(reinterpret_cast<uint64_t>(where)));
  };
  CHECK(refusal({}).find("a malformed introduction") != std::string::npos);
  CHECK(refusal(Bytes(9)).find("a malformed introduction") != std::string::npos);
  CHECK(at(nullptr).find("not the peer's") != std::string::npos);
  CHECK(at(&not_it).find("another incarnation") != std::string::npos);
  // Not a word of ours was said to whoever listens there.
  int num_came = 0;
  for (Fd came; came = Fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC)), came;) {
    Bytes message;
    std::vector<Fd> fds;
    CHECK(receive(came.get(), message, fds, 8) == Received::kClosed);
    ++num_came;
  }
  CHECK(num_came == 4);
}
