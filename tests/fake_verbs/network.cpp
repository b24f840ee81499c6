// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "network.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <utility>

#include "common/clock.hpp"

namespace fake_verbs {
namespace {

constexpr uint32_t kMagic = 0x6b765646;
// A datagram carries many packets, because the kernel queues only ten of them by default.
constexpr size_t kDatagram = 48 * 1024;
// Of a peer that does not read (a stopped process): more is lost, as on a wire.
constexpr size_t kMaxWaiting = 256;
constexpr uint32_t kSlots = 1u << kSlotShift;

sockaddr_un address(const std::string& network, uint32_t slot, socklen_t& length) {
  const std::string name = "kvxfer-fake-verbs/" + network + "/" + std::to_string(slot);
  sockaddr_un out{};
  out.sun_family = AF_UNIX;
  const size_t n = std::min(name.size(), sizeof out.sun_path - 1);
  std::memcpy(out.sun_path + 1, name.data(), n);
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + n);
  return out;
}

}  // namespace

void Network::open() {
  if (alone) return;
  const char* network = std::getenv("KVXFER_FAKE_VERBS_NET");
  name_ = network ? network : std::to_string(::getuid());
  fd_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "fake_verbs: socket");
  const uint32_t first = std::random_device{}();
  for (uint32_t i = 0; i < kSlots; ++i) {
    slot_ = (first + i) % kSlots;
    if (slot_ == 0) continue;  // QP numbers 0 and 1 belong to the subnet's management
    socklen_t length = 0;
    const sockaddr_un to = address(name_, slot_, length);
    if (::bind(fd_, reinterpret_cast<const sockaddr*>(&to), length) == 0) return;
    if (errno != EADDRINUSE) break;
  }
  throw std::system_error(errno, std::generic_category(),
                          "fake_verbs: no socket name is free in network '" + name_ + "'");
}

void Network::abandon() noexcept {
  ::close(fd_);
  for (auto& [slot, peer] : peers_)
    if (peer.fd >= 0) ::close(peer.fd);
}

void Network::send(Packet packet, const Plan& plan, std::mt19937_64& random, int64_t now) {
  const auto hit = [&](double p) {
    return p > 0 && std::uniform_real_distribution<>()(random) < p;
  };
  const auto within = [&](int64_t up_to) {
    return std::uniform_int_distribution<int64_t>(0, up_to)(random);
  };
  packet.head.magic = kMagic;
  packet.head.num_bytes = static_cast<uint32_t>(packet.payload.size());
  if (hit(plan.duplicate.probability)) {
    ++duplicated;
    late_.emplace(now + within(plan.duplicate.up_to_ns), packet);
  }
  if (is_response(packet.head.kind) && hit(plan.lose_ack)) {
    ++acks_lost;
    return;
  }
  if (hit(plan.drop)) {
    ++dropped;
    return;
  }
  release_due(now);  // or this one overtakes what is due and still here
  const uint64_t pair = uint64_t{packet.head.src_qpn} << 32 | packet.head.dest_qpn;
  const auto last = last_due_.find(pair);
  const bool late = hit(plan.delay.probability);
  int64_t due = late ? now + within(plan.delay.up_to_ns) : now;
  if (last != last_due_.end()) {
    due = std::max(due, last->second);
    if (due <= now) last_due_.erase(last);
  }
  if (due <= now) return route(std::move(packet));
  ++delayed;
  last_due_[pair] = due;
  late_.emplace(due, std::move(packet));
}

void Network::route(Packet packet) {
  const uint32_t slot = packet.head.dest_qpn >> kSlotShift;
  if (slot == slot_) return arrive(std::move(packet));
  if (slot >= kSlots || alone) return;
  Peer& peer = peers_[slot];
  if (peer.fd < 0) {
    socklen_t length = 0;
    const sockaddr_un to = address(name_, slot, length);
    peer.fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (peer.fd >= 0) {
      const int room = 4 << 20;  // best effort: the default holds four datagrams
      ::setsockopt(peer.fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    }
    if (peer.fd < 0 || ::connect(peer.fd, reinterpret_cast<const sockaddr*>(&to), length) != 0) {
      if (peer.fd >= 0) ::close(peer.fd);
      peers_.erase(slot);  // nobody there: lost, and the sender's retries will tell
      return;
    }
  }
  dispatch(peer, packet);
}

void Network::dispatch(Peer& peer, const Packet& packet) {
  const size_t need = sizeof(Head) + packet.payload.size();
  if (peer.waiting.empty() || peer.waiting.back().size() + need > kDatagram) {
    if (peer.waiting.size() >= kMaxWaiting) {
      ++dropped;
      return;
    }
    peer.waiting.emplace_back().reserve(kDatagram);
  }
  std::vector<std::byte>& out = peer.waiting.back();
  const auto* head = reinterpret_cast<const std::byte*>(&packet.head);
  out.insert(out.end(), head, head + sizeof(Head));
  out.insert(out.end(), packet.payload.begin(), packet.payload.end());
}

bool Network::drain(Peer& peer) {
  while (!peer.waiting.empty()) {
    const std::vector<std::byte>& next = peer.waiting.front();
    if (::send(peer.fd, next.data(), next.size(), MSG_NOSIGNAL) < 0) {
      if (errno == EAGAIN || errno == ENOBUFS) return true;
      if (errno == EINTR) continue;
      // The process behind it is gone; somebody else may hold the slot later.
      ::close(peer.fd);
      return false;
    }
    peer.waiting.pop_front();
  }
  return true;
}

void Network::flush() {
  for (auto it = peers_.begin(); it != peers_.end();)
    it = drain(it->second) ? std::next(it) : peers_.erase(it);
}

void Network::leave_peers() {
  flush();
  std::erase_if(peers_, [](const auto& entry) {
    if (!entry.second.waiting.empty()) return false;
    ::close(entry.second.fd);
    return true;
  });
}

void Network::arrive(Packet packet) {
  const auto held = held_.find(packet.head.dest_qpn);
  (held == held_.end() ? arrived_ : held->second).push_back(std::move(packet));
}

void Network::release(uint32_t qpn) {
  const auto held = held_.find(qpn);
  if (held == held_.end()) return;
  for (Packet& packet : held->second) arrived_.push_back(std::move(packet));
  held_.erase(held);
}

void Network::pass(uint32_t qpn, int num_packets) {
  const auto held = held_.find(qpn);
  if (held == held_.end()) return;
  for (; num_packets > 0 && !held->second.empty(); --num_packets) {
    arrived_.push_back(std::move(held->second.front()));
    held->second.pop_front();
  }
}

// Anybody of this machine may send to the name, so nothing is believed.
void Network::parse(const std::byte* data, size_t n) {
  while (n >= sizeof(Head)) {
    Packet packet;
    std::memcpy(&packet.head, data, sizeof(Head));
    if (packet.head.magic != kMagic || packet.head.num_bytes > n - sizeof(Head)) return;
    packet.payload.assign(data + sizeof(Head), data + sizeof(Head) + packet.head.num_bytes);
    data += sizeof(Head) + packet.head.num_bytes;
    n -= sizeof(Head) + packet.head.num_bytes;
    arrive(std::move(packet));
  }
}

void Network::release_due(int64_t now) {
  while (!late_.empty() && late_.begin()->first <= now) {
    route(std::move(late_.begin()->second));
    late_.erase(late_.begin());
  }
  if (late_.empty()) last_due_.clear();
}

void Network::receive(std::deque<Packet>& out, size_t most, int64_t now) {
  release_due(now);
  std::vector<std::byte> buffer(alone ? 0 : kDatagram + 8192);
  while (!alone && arrived_.size() < most) {
    const ssize_t n = ::recv(fd_, buffer.data(), buffer.size(), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) break;
    parse(buffer.data(), static_cast<size_t>(n));
  }
  for (; !arrived_.empty() && most > 0; --most) {
    out.push_back(std::move(arrived_.front()));
    arrived_.pop_front();
  }
}

int64_t Network::next_due() const noexcept {
  if (!arrived_.empty()) return 0;
  return late_.empty() ? kvxfer::kNever : late_.begin()->first;
}

void Network::add_poll(std::vector<pollfd>& out) const {
  out.push_back({fd_, POLLIN, 0});
  for (const auto& [slot, peer] : peers_)
    if (!peer.waiting.empty()) out.push_back({peer.fd, POLLOUT, 0});
}

}  // namespace fake_verbs
