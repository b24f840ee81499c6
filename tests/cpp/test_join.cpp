// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Joining a session over a Unix socket, shm's and cma's, by somebody else: who does not prove that
// it belongs to the session gets nothing, and what it says or hands over is not kept.
#include "join_world.hpp"

using namespace kvxfer;
using namespace kvxfer::join;

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
