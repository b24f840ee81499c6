// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Is the peer still there? Asked after a second of silence, and only while a request is open, so an
// idle connection costs nothing. A lost host, idle or not, is noticed by the kernel's keepalive.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>

#include "transport/tcp/deliveries.hpp"

namespace kvxfer::tcp {
namespace {
constexpr int64_t kSilenceNs = 1'000'000'000;
// After so long without any acknowledgement of TCP's the host is given up. TCP_USER_TIMEOUT would
// do that in the kernel, but it also ends connections to a host that is alive and acknowledges
// while its engine is stopped with a full window: those must wait for the deadline.
constexpr int64_t kUnreachableNs = 5'000'000'000;
constexpr uint8_t kMaxProbes = 8;  // of a full window, unanswered, in a row

tcp_info info_of(const Stream& stream) {
  tcp_info info{};
  socklen_t size = sizeof info;
  ::getsockopt(stream.fd(), IPPROTO_TCP, TCP_INFO, &info, &size);  // zeros: nothing is known
  return info;
}
}  // namespace

// Any thread, when watched_ has just become true.
void TcpConnection::watch_peer() {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().at(now_ns() + kSilenceNs, [self] { self->look_after(); });
}

void TcpConnection::look_after() noexcept {
  const int64_t now = now_ns();
  bool idle;
  {
    std::lock_guard lock(mutex_);
    const bool open = !flights_.empty() || !zombies_.empty();
    if (dead_ || !open) {
      watched_ = false;  // the next post() begins again
      return;
    }
    idle = lanes_[0]->queue.empty() && lanes_[0]->out.empty();
  }
  if (now - heard_ns_ >= kSilenceNs) {
    if (auto cause = unreachable(now)) {
      close(*cause);
      return;
    }
    if (pinged_ns_.load(std::memory_order_relaxed) == 0)
      pinged_ns_.store(now, std::memory_order_relaxed);
    if (idle) enqueue(encode_plain(Type::kPing, {}));  // else it waits behind what is there already
  }
  watch_peer();
}

std::optional<Failure> TcpConnection::unreachable(int64_t now) const {
  const int64_t pinged = pinged_ns_.load(std::memory_order_relaxed);
  if (pinged == 0 || now - pinged < kUnreachableNs) return {};
  for (auto& lane : lanes_) {
    const tcp_info info = info_of(*lane->stream);
    const int64_t unheard_ns = int64_t{info.tcpi_last_ack_recv} * 1'000'000;
    const bool unacknowledged = info.tcpi_unacked > 0 && unheard_ns >= kUnreachableNs;
    if (unacknowledged || info.tcpi_probes >= kMaxProbes)
      return Failure{.code = Code::kPeerDisconnected,
                     .err = ETIMEDOUT,
                     .text = cat("the peer's host is unreachable: nothing was acknowledged for ",
                                 unheard_ns / 1'000'000, " ms")};
  }
  return {};
}

std::string TcpConnection::condition() const {
  const int64_t pinged = pinged_ns_.load(std::memory_order_relaxed);
  if (pinged == 0) return {};
  const char* what = info_of(*lanes_[0]->stream).tcpi_unacked == 0
                         ? "host alive, engine not running: TCP acknowledges, but a PING"
                         : "host or network silent: not even TCP acknowledges; a PING";
  return cat(what, " has had no answer for ", (now_ns() - pinged) / 1'000'000, " ms");
}

}  // namespace kvxfer::tcp
