// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/incoming.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "common/random.hpp"

namespace kvxfer::tcp {

Incoming::Incoming(TcpTransport& transport, Fd fd, uint64_t serial)
    : transport_(transport),
      fd_(std::move(fd)),
      serial_(serial),
      address_(peer_address(fd_.get())) {
  buffer_.resize(kHeadBytes);
}

void Incoming::start() {
  Reactor& reactor = transport_.host_.reactor();
  timer_ = reactor.at(deadline_after(kHandshakeTimeoutS), [weak = weak_from_this()] {
    if (auto self = weak.lock()) self->end("the handshake was not finished in time", true);
  });
  token_ = reactor.add(fd_.get(), EPOLLIN | EPOLLRDHUP, shared_from_this());
}

void Incoming::leave_reactor() {
  if (token_ != 0) transport_.host_.reactor().remove(std::exchange(token_, 0), fd_.get());
  transport_.host_.reactor().cancel(timer_);
}

void Incoming::end(const std::string& reason, bool tell) {
  if (std::exchange(ended_, true)) return;
  auto self = shared_from_this();
  // Counted before the client can know: whoever saw the refusal finds it in stats().
  if (!reason.empty()) transport_.host_.turned_away(address_, reason);
  if (tell) send(encode_failure(Type::kError, 0, {.code = Code::kTransport, .text = reason}));
  leave_reactor();
  fd_.reset();
  lanes_.clear();
  transport_.forget(this);
}

bool Incoming::send(ByteView bytes) {
  // A few hundred bytes into an empty socket buffer: all or nothing.
  const ssize_t n = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  return n == static_cast<ssize_t>(bytes.size());
}

void Incoming::on_events(uint32_t) {
  auto self = shared_from_this();
  while (!ended_ && token_ != 0 && want_ != Want::kLanes && read_frame()) on_frame();
  // While lanes are joining nothing is due on this one; only its end matters.
  if (!ended_ && token_ != 0 && want_ == Want::kLanes) {
    std::byte peek;
    if (::recv(fd_.get(), &peek, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
      end({}, false);  // authenticated, and found that it knows us already
  }
}

bool Incoming::read_frame() {
  for (;;) {
    if (have_ == buffer_.size()) {
      if (have_ > kHeadBytes) return true;
      const auto head = decode_head(buffer_, kMaxHandshakeBytes);
      if (!head || head->body_nbytes != 0) {
        end("not a kvxfer handshake, or of another version", true);
        return false;
      }
      head_ = *head;
      if (head_.control_nbytes == 0) {
        end("empty handshake frame", true);
        return false;
      }
      buffer_.resize(kHeadBytes + head_.control_nbytes);
    }
    const ssize_t n =
        ::recv(fd_.get(), buffer_.data() + have_, buffer_.size() - have_, MSG_DONTWAIT);
    if (n > 0) {
      have_ += static_cast<size_t>(n);
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else if (n < 0 && errno == EAGAIN) {
      return false;
    } else {
      end("the client went away during the handshake", false);
      return false;
    }
  }
}

void Incoming::on_frame() {
  if (want_ == Want::kFirst && head_.type == Type::kHello) {
    on_hello();
  } else if (want_ == Want::kFirst && head_.type == Type::kJoin) {
    on_join();
    return;  // the socket is another's now
  } else if (want_ == Want::kAuth && head_.type == Type::kAuth) {
    on_auth();
  } else {
    end("handshake frames out of order", true);
  }
  have_ = 0;
  buffer_.resize(kHeadBytes);
}

void Incoming::on_hello() {
  const auto hello = decode_hello(ByteView(buffer_).subspan(kHeadBytes));
  if (!hello) return end("malformed HELLO", true);
  if (hello->min_version > kVersion || hello->max_version < kVersion)
    return end(cat("no common version: ours is ", static_cast<int>(kVersion), ", the client's are ",
                   hello->min_version, " to ", hello->max_version),
               true);
  if (hello->self.incarnation == transport_.host_.self().incarnation)
    return end("an engine cannot be its own peer", true);
  peer_ = *hello;
  num_lanes_ = std::min({peer_.num_lanes, transport_.config_.num_lanes, kMaxLanes});
  Hello answer = transport_.hello();
  answer.num_lanes = num_lanes_;
  const Bytes bytes = encode_hello(answer);
  transcript_.add(buffer_);
  transcript_.add(bytes);
  keys_ = derive_keys(transport_.secret_, peer_, answer);
  want_ = Want::kAuth;
  if (!send(bytes)) end("the client does not read", false);
}

void Incoming::on_auth() {
  const Digest expected = client_proof(keys_, transcript_);
  if (!equal_constant_time(ByteView(buffer_).subspan(kHeadBytes), expected))
    return end(std::string(kAuthenticationFailed), true);
  transcript_.add(buffer_);
  lanes_.resize(num_lanes_ + 1);
  want_ = Want::kLanes;
  if (!send(encode_plain(Type::kAuth, server_proof(keys_, transcript_))))
    end("the client does not read", false);
}

void Incoming::on_join() {
  const auto join = decode_join(ByteView(buffer_).subspan(kHeadBytes));
  if (!join) return end("malformed JOIN", true);
  for (auto& [key, other] : transport_.incoming_) {
    if (other->want_ != Want::kLanes || other->keys_.session_id != join->session) continue;
    const Digest expected = lane_proof(other->keys_.session, join->session, join->lane);
    if (!equal_constant_time(join->proof, expected) || join->lane == 0 ||
        join->lane > other->num_lanes_ || other->lanes_[join->lane])
      break;
    auto session = other;
    leave_reactor();
    ended_ = true;
    Fd lane = std::move(fd_);
    transport_.forget(this);
    session->take_lane(join->lane, std::move(lane));
    return;
  }
  end(std::string(kAuthenticationFailed), true);
}

void Incoming::take_lane(uint32_t index, Fd fd) {
  set_options(fd.get(), true);
  lanes_[index] = std::move(fd);
  if (std::all_of(lanes_.begin() + 1, lanes_.end(), [](const Fd& lane) { return bool(lane); }))
    complete();
}

void Incoming::complete() {
  auto self = shared_from_this();
  const Bytes offers = encode_plain(Type::kOffer, transport_.host_.offers());
  if (!send(offers)) return end("the client does not read", false);
  leave_reactor();
  ended_ = true;
  lanes_[0] = std::move(fd_);
  Session session{
      .id = keys_.session_id, .key = keys_.session, .peer = peer_.self, .initiator = false};
  auto connection =
      std::make_shared<TcpConnection>(transport_.host_, std::move(session), std::move(lanes_));
  transport_.forget(this);
  if (transport_.host_.opened(connection)) connection->start();
}

}  // namespace kvxfer::tcp
