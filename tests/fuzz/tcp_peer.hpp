// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A tcp connection after its handshake and, at the other end of its lanes, a peer that the input
// moves. There are no sockets: a lane takes as much, and brings it in such pieces, as it is told.
// What the engine says is taken apart, and must be well-formed.
#pragma once

#include <sys/socket.h>

#include <cerrno>
#include <memory>
#include <utility>
#include <vector>

#include "tcp_host.hpp"

namespace kvxfer::fuzz {

// One lane. Its bytes do not go through its socket, which is there to tell epoll of them.
class FakeStream final : public tcp::Stream {
 public:
  FakeStream() : FakeStream(sockets()) {}
  void wake() noexcept {
    // Not when either side has shut it down, which is told by itself.
    [[maybe_unused]] const ssize_t n = ::send(other_.get(), "", 1, MSG_NOSIGNAL);
  }
  void end() noexcept {
    ended_ = true;
    ::shutdown(other_.get(), SHUT_WR);
  }
  void say(ByteView bytes) { said_.insert(said_.end(), bytes.begin(), bytes.end()); }
  size_t unread() const noexcept { return said_.size() - taken_; }

  ssize_t send(std::span<const iovec> pieces) noexcept override {
    size_t sum = 0;
    for (const iovec& each : pieces) {
      const size_t n = std::min(each.iov_len, room);
      const auto* from = static_cast<const std::byte*>(each.iov_base);
      heard.insert(heard.end(), from, from + n);
      sum += n, room -= n;
      if (n < each.iov_len) break;
    }
    return sum > 0 ? static_cast<ssize_t>(sum) : blocked();
  }
  ssize_t receive(std::span<const iovec> pieces) noexcept override {
    hear_wakes();
    size_t sum = 0;
    for (const iovec& each : pieces) {
      const ByteView bytes = take(std::min(each.iov_len, piece - sum));
      if (!bytes.empty()) std::memcpy(each.iov_base, bytes.data(), bytes.size());
      sum += bytes.size();
      if (bytes.size() < each.iov_len) break;
    }
    return sum > 0 ? static_cast<ssize_t>(sum) : ended_ ? 0 : blocked();
  }
  ssize_t drop(size_t nbytes) noexcept override {
    hear_wakes();
    const size_t n = take(std::min(nbytes, piece)).size();
    return n > 0 ? static_cast<ssize_t>(n) : ended_ ? 0 : blocked();
  }

  static constexpr size_t kAll = ~size_t{0};
  size_t room = kAll;   // what it still takes
  size_t piece = kAll;  // that it brings at a time
  Bytes heard;

 private:
  using Ends = std::pair<Fd, Fd>;
  static Ends sockets() {
    int ends[2];
    FUZZ_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    return {Fd(ends[0]), Fd(ends[1])};
  }
  explicit FakeStream(Ends ends) : Stream(std::move(ends.first)), other_(std::move(ends.second)) {}
  void hear_wakes() noexcept {
    char some[256];
    while (::recv(fd(), some, sizeof some, MSG_DONTWAIT) > 0) {
    }
  }
  ByteView take(size_t nbytes) noexcept {
    const ByteView out = ByteView(said_).subspan(taken_).first(std::min(nbytes, unread()));
    taken_ += out.size();
    return out;
  }
  static ssize_t blocked() noexcept {
    errno = EAGAIN;
    return -1;
  }
  const Fd other_;
  bool ended_ = false;
  Bytes said_;
  size_t taken_ = 0;
};

class TcpPeer {
 public:
  TcpPeer(TcpHost& host, size_t num_lanes) : host_(host) {
    std::vector<tcp::StreamPtr> streams;
    for (size_t i = 0; i < num_lanes; ++i) {
      auto stream = std::make_unique<FakeStream>();
      lanes_.push_back(stream.get());
      streams.push_back(std::move(stream));
    }
    parsed_.resize(num_lanes);
    connection_ =
        std::make_shared<tcp::TcpConnection>(host, Session{.peer = {}}, std::move(streams));
    connection_->start();
  }
  tcp::TcpConnection& connection() noexcept { return *connection_; }
  size_t num_lanes() const noexcept { return lanes_.size(); }
  FakeStream& lane(size_t i) noexcept { return *lanes_[i % lanes_.size()]; }

  void say(size_t lane_index, ByteView bytes) {
    if (host_.is_lost()) return;
    lane(lane_index).say(bytes);
    lane(lane_index).wake();
  }
  // The engine's thread has its turn.
  void work() {
    host_.reactor().round();
    host_.reactor().round();
    hear();
    host_.look();
  }
  // What it asked of us, as far as it was heard, and how many ABORTs it has been told of.
  struct Asked {
    uint64_t request = 0;
    uint32_t stripe = 0;
    uint32_t nbytes = 0;
  };
  std::vector<Asked> reads;
  std::vector<uint64_t> writes;  // of which a stripe came
  uint32_t num_aborts = 0;

  // The end: the peer's process is gone, or else our engine closes.
  void leave(bool closes) {
    if (closes) connection_->close({.code = Code::kCancelled, .text = "the engine closes"});
    for (FakeStream* each : lanes_) {
      each->room = each->piece = FakeStream::kAll;
      if (host_.is_lost()) continue;
      each->wake();
      each->end();
    }
    // The end of lane 0 is waited for a little, when another's was heard first.
    for (int i = 0; i < 4000 && !host_.is_lost(); ++i) work(), host_.pass_time(1'000'000);
    FUZZ_CHECK(host_.is_lost());
    hear();
  }

 private:
  void hear() {
    for (size_t i = 0; i < lanes_.size(); ++i) {
      Bytes& bytes = lanes_[i]->heard;
      size_t& at = parsed_[i];
      while (const size_t n = frame(ByteView(bytes).subspan(at))) at += n;
      if (at < bytes.size() / 2 + 1) continue;
      bytes.erase(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(at));
      at = 0;
    }
  }
  // The bytes of a frame that is whole, or 0.
  size_t frame(ByteView bytes) {
    using tcp::Type;
    if (bytes.size() < tcp::kHeadBytes) return 0;
    const auto head = tcp::decode_head(bytes.first(tcp::kHeadBytes), tcp::kMaxControlBytes);
    FUZZ_CHECK(head);
    const bool has_body = head->type == Type::kStripe || head->type == Type::kReadData;
    const size_t body_at = tcp::kHeadBytes + head->control_nbytes;
    const size_t trailer_at = body_at + head->body_nbytes;
    const size_t size = trailer_at + (has_body ? tcp::kTrailerBytes : 0);
    if (bytes.size() < size) return 0;
    const ByteView control = bytes.subspan(tcp::kHeadBytes, head->control_nbytes);
    const ByteView body = bytes.subspan(body_at, head->body_nbytes);
    FUZZ_CHECK(has_body || body.empty());
    const auto trailer = has_body ? tcp::decode_trailer(bytes.subspan(trailer_at, 8)) : Code::kOk;
    FUZZ_CHECK(trailer);
    tcp::StripeHead stripe;
    if (head->type == Type::kStripe || head->type == Type::kRead)
      FUZZ_CHECK(tcp::decode_stripe(*head, control, stripe));
    switch (head->type) {
      case Type::kStripe:
        // What counts is of memory that was still the request's.
        if (*trailer == Code::kOk)
          for (const std::byte each : body) FUZZ_CHECK(each == kUntouched);
        writes.push_back(head->request);
        break;
      case Type::kRead: {
        uint64_t sum = 0;
        for (const Target& each : stripe.targets) sum += each.nbytes;
        reads.push_back({head->request, stripe.stripe, static_cast<uint32_t>(sum)});
        break;
      }
      case Type::kReadData:
        FUZZ_CHECK(control.size() == 4);
        break;
      case Type::kAck:
        FUZZ_CHECK(!control.empty() && control.size() % 8 == 0);
        break;
      case Type::kRefuse:
      case Type::kError:
        FUZZ_CHECK(tcp::decode_failure(control));
        break;
      case Type::kAbort:
      case Type::kPing:
      case Type::kPong:
      case Type::kBye:
        FUZZ_CHECK(control.empty());
        break;
      default:
        FUZZ_CHECK(head->type == Type::kControl);  // nothing else has a place here
    }
    return size;
  }

  TcpHost& host_;
  std::vector<FakeStream*> lanes_;
  std::vector<size_t> parsed_;
  std::shared_ptr<tcp::TcpConnection> connection_;
};

}  // namespace kvxfer::fuzz
