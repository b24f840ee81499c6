// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A tcp peer that knows the secret and says what it likes, frame by frame, to a real engine; and
// that engine, with memory around whatever it granted, and an honest peer beside the other.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/racy_copy.hpp"
#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fuzz/fuzz.hpp"
#include "fuzz/handshake_host.hpp"
#include "transport/tcp/socket.hpp"

namespace kvxfer {

using fuzz::kTheirs;
using fuzz::kUntouched;

// Whether a byte of theirs is there, which the engine may be storing right now.
inline bool has_landed(const std::byte& at) {
  std::byte seen{};
  racy_copy(&seen, &at, 1);
  return seen == kTheirs;
}

struct HeardFrame {
  tcp::Head head;
  Bytes control, body;
};

// A STRIPE, or a READ, as it is going to be said.
struct Said {
  std::vector<Target> targets = {};
  uint64_t request = 1;
  Op op = Op::kWrite;
  std::optional<uint64_t> total = {};  // none: the sum
  std::optional<uint64_t> arrival = {};
  std::optional<std::string> notify = {};
  Code trailer = Code::kOk;
  uint32_t cancel_count = 0;
  RegionRef region = {};
  LeaseRef lease = {};
};

inline Bytes frame_of(const Said& said) {
  tcp::StripeHead stripe;
  stripe.access = {said.op, said.region, said.lease, said.arrival};
  uint64_t sum = 0;
  for (const Target& t : said.targets) sum += t.nbytes;
  stripe.targets = said.targets;
  stripe.total_nbytes = said.total.value_or(sum);
  stripe.has_notify = said.notify.has_value();
  const bool read = said.op == Op::kRead;
  Bytes out = tcp::encode_stripe({.type = read ? tcp::Type::kRead : tcp::Type::kStripe,
                                  .body_nbytes = read ? 0 : static_cast<uint32_t>(sum),
                                  .request = said.request,
                                  .cancel_count = said.cancel_count},
                                 stripe, as_bytes_view(said.notify.value_or("")));
  if (read) return out;
  out.resize(out.size() + sum, kTheirs);
  std::array<std::byte, tcp::kTrailerBytes> trailer;
  tcp::write_trailer(said.trailer, trailer.data());
  out.insert(out.end(), trailer.begin(), trailer.end());
  return out;
}
inline Bytes read_data(uint64_t request, uint32_t stripe, uint32_t nbytes,
                       Code trailer = Code::kOk) {
  Bytes out = tcp::encode_read_data(request, stripe, nbytes);
  out.resize(out.size() + nbytes + tcp::kTrailerBytes, kTheirs);
  tcp::write_trailer(trailer, out.data() + out.size() - tcp::kTrailerBytes);
  return out;
}
inline Bytes frame_of(tcp::Type type) { return tcp::encode_plain(type, {}); }
// The same with one field of it changed.
template <typename T>
Bytes with(Bytes frame, size_t at, T value) {
  std::memcpy(frame.data() + at, &value, sizeof value);
  return frame;
}
inline Bytes operator+(Bytes a, const Bytes& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class HostilePeer {
 public:
  HostilePeer(const std::string& address, uint8_t who, uint32_t num_lanes) : host_(who) {
    TransportConfig config;
    config.num_lanes = num_lanes;
    tcp::TcpTransport transport(host_, Bytes(32, std::byte{1}), config);
    const Patience patience(deadline_after(10));
    // The sockets outlive the connection that the handshake ends with: it is never started.
    const auto dial = [&](bool bulk) {
      Fd fd = tcp::connect(address, patience, bulk);
      lanes.emplace_back(::dup(fd.get()));
      return std::make_unique<tcp::Stream>(std::move(fd));
    };
    transport.establish(dial, patience, [](const PeerIdentity&) { return true; });
    heard_.resize(lanes.size());
    say(0, frame_of(tcp::Type::kReady));
  }
  const Incarnation& incarnation() const { return host_.self().incarnation; }

  // False: it was hung up on.
  bool say(size_t lane, ByteView bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(lanes[lane].get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n > 0) {
        bytes = bytes.subspan(static_cast<size_t>(n));
      } else if (errno == EAGAIN) {
        pollfd entry{lanes[lane].get(), POLLOUT, 0};
        REQUIRE(::poll(&entry, 1, 20'000) > 0);
      } else {
        return false;
      }
    }
    return true;
  }
  // The next frame. Nothing: the lane has ended.
  std::optional<HeardFrame> hear(size_t lane) {
    const auto bytes = take(lane, tcp::kHeadBytes);
    if (!bytes) return {};
    HeardFrame out;
    out.head = tcp::decode_head(*bytes, tcp::kMaxControlBytes).value();
    const bool has_body =
        out.head.type == tcp::Type::kStripe || out.head.type == tcp::Type::kReadData;
    const auto control = take(lane, out.head.control_nbytes);
    const auto body = take(lane, out.head.body_nbytes);
    if (!control || !body || (has_body && !take(lane, tcp::kTrailerBytes))) return {};
    out.control = *control, out.body = *body;
    return out;
  }
  // The next one of this type; others are passed over.
  std::optional<HeardFrame> hear(size_t lane, tcp::Type type) {
    for (;;) {
      auto frame = hear(lane);
      if (!frame || frame->head.type == type) return frame;
    }
  }
  // Whether the engine still answers: all that lane 0 was told has been acted on by then.
  bool answered() {
    return say(0, frame_of(tcp::Type::kPing)) && hear(0, tcp::Type::kPong).has_value();
  }
  // All that comes until the end of the lane.
  size_t drain(size_t lane) {
    size_t sum = heard_[lane].size();
    while (more(lane)) sum += std::exchange(heard_[lane], {}).size();
    return sum;
  }

  std::vector<Fd> lanes;

 private:
  std::optional<Bytes> take(size_t lane, size_t nbytes) {
    Bytes& heard = heard_[lane];
    while (heard.size() < nbytes)
      if (!more(lane)) return {};
    const auto end = heard.begin() + static_cast<ptrdiff_t>(nbytes);
    Bytes out(heard.begin(), end);
    heard.erase(heard.begin(), end);
    return out;
  }
  bool more(size_t lane) {
    pollfd entry{lanes[lane].get(), POLLIN, 0};
    REQUIRE(::poll(&entry, 1, 20'000) > 0);
    std::byte bytes[16 * 1024];
    const ssize_t n = ::recv(lanes[lane].get(), bytes, sizeof bytes, 0);
    if (n > 0) heard_[lane].insert(heard_[lane].end(), bytes, bytes + n);
    return n > 0;
  }

  fuzz::HandshakeHost host_;
  std::vector<Bytes> heard_;
};

struct HostileWorld {
  static constexpr size_t kGuard = 4096, kBytes = 64 * 1024, kBig = 2 << 20;
  static constexpr uint64_t kNumArrivals = 4;
  static constexpr Extent kGranted[] = {{4096, 8192}, {16384, 20480}};

  std::shared_ptr<Engine> engine, honest;
  // Of the engine: for the peer's requests; read-only; for its own; for the honest peer.
  Bytes memory, big, own, apart;
  RegionPtr region, read_only, mine;
  LeasePtr lease;
  uint64_t num_submitted = 0;
  std::map<Incarnation, PeerPtr> came;
  std::map<Incarnation, std::string> lost;

  explicit HostileWorld(uint32_t num_lanes = 2)
      : memory(kGuard + kBytes + kGuard), big(kBig), own(kGuard + kBig + kGuard), apart(kGuard) {
    EngineOptions options;
    options.secret = Bytes(32, std::byte{1});
    options.transports = {"tcp"};
    options.transport.num_lanes = num_lanes_ = num_lanes;
    engine = Engine::create(options);
    const auto add = [&](const char* name, Bytes& bytes, size_t guard, bool writable, bool lease) {
      std::memset(bytes.data(), static_cast<int>(kUntouched), bytes.size());
      return engine->register_pieces({{bytes.data() + guard, 0, bytes.size() - 2 * guard}},
                                     writable, nullptr, {.name = name, .require_lease = lease});
    };
    region = add("kv", memory, kGuard, true, true);
    read_only = add("big", big, 0, false, false);
    mine = add("own", own, kGuard, true, true);
    add("apart", apart, 0, true, false);
    const int64_t at[] = {4096, 16384}, n[] = {4096, 4096};
    lease = engine->grant(region, {at, 2, true}, {n, 2, true}, 600, {}, kNumArrivals);
    honest = Engine::create(options);
    source_ = honest->allocate(kGuard, {.name = "source"});
    to_engine_ = honest->connect(engine->address(), 10);
  }
  ~HostileWorld() {
    honest->close();
    engine->close();
  }

  std::unique_ptr<HostilePeer> enter() {
    auto peer = std::make_unique<HostilePeer>(engine->address(), next_++, num_lanes_);
    REQUIRE(eventually_within(10, [&] { return look().came.contains(peer->incarnation()); }));
    return peer;
  }
  HostileWorld& look() {
    for (auto& event : engine->peer_events())
      if (event.connected)
        came[event.peer->identity.incarnation] = event.peer;
      else
        lost[event.peer->identity.incarnation] = event.cause;
    return *this;
  }
  // How its connection ended; until then every byte of it may still land.
  std::string end_of(const HostilePeer& peer) {
    const bool ended =
        eventually_within(20, [&] { return look().lost.contains(peer.incarnation()); });
    return ended ? lost[peer.incarnation()] : "it goes on";
  }
  std::string leave(HostilePeer& peer) {
    for (const Fd& lane : peer.lanes) ::shutdown(lane.get(), SHUT_WR);
    return end_of(peer);
  }

  // With the right names and keys of what it may do.
  Said said(std::vector<Target> targets, Said rest = {}) const {
    rest.targets = std::move(targets);
    rest.region = {region->id, region->key};
    rest.lease = {lease->id, lease->key};
    return rest;
  }

  // No byte has changed but those that were granted, or none at all; which then are as before.
  void check_memory(bool any_landed) {
    const auto same = [&](size_t begin, size_t end) {
      return all_equal(memory.data() + begin, end - begin, static_cast<int>(kUntouched));
    };
    CHECK(same(0, kGuard + 4096));
    CHECK(same(kGuard + 8192, kGuard + 16384));
    CHECK(same(kGuard + 20480, memory.size()));
    for (const Extent& e : kGranted) {
      if (!any_landed) CHECK(same(kGuard + e.begin, kGuard + e.end));
      std::memset(memory.data() + kGuard + e.begin, static_cast<int>(kUntouched), e.end - e.begin);
    }
    CHECK(all_equal(big.data(), big.size(), static_cast<int>(kUntouched)));
  }
  // Whether the peer beside it goes on undisturbed.
  void check_honest() {
    const auto there = honest->regions_of(*to_engine_).at("apart");
    for (const Op op : {Op::kWrite, Op::kRead}) {
      const std::byte value{++round_};
      std::memset(op == Op::kWrite ? source_->pieces[0].base : apart.data(), round_, kGuard);
      const int64_t zero = 0, nbytes = kGuard;
      SubmitOptions options;
      options.deadline_ns = deadline_after(30);
      finish(honest->submit(
          op, source_, there,
          SpanArguments{{&zero, 1, true}, {&zero, 1, true}, {&nbytes, 1, true}, {}, false},
          std::move(options)));
      CHECK(apart[kGuard - 1] == value);
      CHECK(source_->pieces[0].base[kGuard - 1] == value);
    }
    CHECK(to_engine_->alive);
  }

  // A request of the engine's to the hostile peer, whose region is as large as it says.
  TransferPtr submit(Op op, HostilePeer& peer, int64_t local, int64_t nbytes) {
    const PeerPtr to = came.at(peer.incarnation());
    if (!engine->regions_of(*to).contains("theirs")) {
      peer.say(0,
               tcp::encode_plain(tcp::Type::kControl,
                                 encode(RegionAdded{{1, {}}, uint64_t{1} << 30, true, "theirs"})));
      REQUIRE(peer.answered());
    }
    SubmitOptions options;
    options.deadline_ns = deadline_after(60);
    ++num_submitted;
    return engine->submit(
        op, mine, engine->regions_of(*to).at("theirs"),
        SpanArguments{{&local, 1, true}, {&local, 1, true}, {&nbytes, 1, true}, {}, false},
        std::move(options));
  }
  // Each of them has ended, once, and nothing is under way.
  void check_ends() {
    CHECK(eventually_within(10, [&] { return engine->stats().unquiesced == 0; }));
    const EngineStats stats = engine->stats();
    CHECK(stats.in_flight == 0);
    CHECK(stats.done + stats.failed + stats.timed_out + stats.cancelled == num_submitted);
  }

 private:
  uint32_t num_lanes_ = 0;
  uint8_t next_ = 10;
  uint8_t round_ = 0;
  RegionPtr source_;
  PeerPtr to_engine_;
};

}  // namespace kvxfer
