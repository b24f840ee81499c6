// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The other role: our side joins, and finds somebody else behind the name that it was offered.
#include "join_world.hpp"

using namespace kvxfer;
using namespace kvxfer::join;

namespace {

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
