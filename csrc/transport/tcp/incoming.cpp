// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/incoming.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "common/random.hpp"

namespace kvxfer::tcp {
namespace {
constexpr double kLingerS = 1.0;  // of a client that was turned away, to hear why
}

Incoming::Incoming(TcpTransport& transport, Fd fd, uint64_t serial)
    : transport_(transport), serial_(serial), address_(peer_address(fd.get())) {
  stream_ = std::make_unique<Stream>(std::move(fd));
  buffer_.resize(kHeadBytes);
}

void Incoming::start() {
  Reactor& reactor = transport_.host_.reactor();
  timer_ = reactor.at(deadline_after(kHandshakeTimeoutS), [weak = weak_from_this()] {
    if (auto self = weak.lock()) self->end("the handshake was not finished in time", true);
  });
  token_ = reactor.add(stream_->fd(), EPOLLIN | EPOLLRDHUP, shared_from_this());
}

void Incoming::leave_reactor() {
  if (token_ != 0) transport_.host_.reactor().remove(std::exchange(token_, 0), stream_->fd());
  transport_.host_.reactor().cancel(timer_);
}

void Incoming::end(const std::string& reason, bool tell) {
  auto self = shared_from_this();
  if (!std::exchange(ended_, true)) {
    // Counted before the client can know: whoever saw the refusal finds it in stats().
    if (!reason.empty()) transport_.host_.turned_away(address_, reason);
    lanes_.clear();
    if (tell) {
      if (want_ != Want::kTls)  // there the alert has said it
        send(encode_failure(Type::kError, 0, {.code = Code::kTransport, .text = reason}));
      return linger();
    }
  }
  leave_reactor();
  transport_.forget(this);
}

void Incoming::give_way(const std::string& reason) {
  if (!ended_ && want_ != Want::kGreeting && want_ != Want::kTls)
    send(encode_failure(Type::kError, 0, {.code = Code::kTransport, .text = reason}));
  end(reason, false);
}

// To close a socket with unread bytes resets it, and the client may lose what it was told. So it is
// read until the client hangs up, or for kLingerS.
void Incoming::linger() {
  want_ = Want::kNothing;
  ::shutdown(stream_->fd(), SHUT_WR);
  Reactor& reactor = transport_.host_.reactor();
  reactor.cancel(timer_);
  timer_ = reactor.at(deadline_after(kLingerS), [weak = weak_from_this()] {
    if (auto self = weak.lock()) self->end({}, false);
  });
}

bool Incoming::send(ByteView bytes) {
  // A few hundred bytes into an empty socket buffer: all or nothing.
  const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  return stream_->send({&piece, 1}) == static_cast<ssize_t>(bytes.size()) && stream_->flush();
}

void Incoming::on_events(uint32_t) {
  auto self = shared_from_this();
  if (want_ == Want::kNothing) {
    const ssize_t n =
        ::recv(stream_->fd(), nullptr, kMaxHandshakeBytes * 16, MSG_DONTWAIT | MSG_TRUNC);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) end({}, false);
    return;
  }
  if (want_ == Want::kGreeting) on_greeting();
  if (want_ == Want::kTls) on_tls();
  while (!ended_ && token_ != 0 && (want_ == Want::kFirst || want_ == Want::kAuth) && read_frame())
    on_frame();
  // While lanes are joining nothing is due on this one; only its end matters.
  if (!ended_ && token_ != 0 && want_ == Want::kLanes) {
    std::byte peek;
    const ssize_t n = ::recv(stream_->fd(), &peek, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0)
      end({}, false);  // authenticated, and found that it knows us already
    else if (n > 0)    // nobody reads it here, so it would wake us again and again
      end("handshake frames out of order", true);
  }
}

// The first byte tells whether the client speaks TLS; both sides must, or neither.
void Incoming::on_greeting() {
  std::byte first{};
  const ssize_t n = ::recv(stream_->fd(), &first, 1, MSG_PEEK | MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) return end("the client went away during the handshake", false);
  const bool asks_for_tls = first == kTlsRecord;
  if (asks_for_tls != (transport_.tls_ != nullptr))
    return end(asks_for_tls ? "the client speaks TLS and this engine does not; give tls= to both, "
                              "or to neither"
                            : "this engine speaks TLS only and the client does not; give tls= to "
                              "both, or to neither",
               true);
  want_ = Want::kFirst;
  if (!asks_for_tls) return;
  auto wrapped = transport_.tls_->wrap(stream_->release(), true);
  tls_ = wrapped.get();
  stream_ = std::move(wrapped);
  want_ = Want::kTls;
}

void Incoming::on_tls() {
  switch (tls_->handshake()) {
    case TlsStream::Progress::kWaiting:
      return;
    case TlsStream::Progress::kDone:
      want_ = Want::kFirst;
      transcript_.add(stream_->binding());
      return;
    case TlsStream::Progress::kFailed:
      end(cat("the TLS handshake failed: ", tls_->explain(EPROTO)), true);
  }
}

bool Incoming::read_frame() {
  for (;;) {
    if (have_ == buffer_.size()) {
      if (have_ > kHeadBytes) return true;
      const auto head = decode_handshake_head(buffer_);
      if (!head) {
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
    const iovec into{buffer_.data() + have_, buffer_.size() - have_};
    const ssize_t n = stream_->receive({&into, 1});
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
  bool known = false;
  for (auto& [key, other] : transport_.incoming_) {
    if (other->want_ != Want::kLanes || other->keys_.session_id != join->session) continue;
    known = true;
    const Digest expected =
        lane_proof(other->keys_.session, join->session, join->lane, stream_->binding());
    if (!equal_constant_time(join->proof, expected) || join->lane == 0 ||
        join->lane > other->num_lanes_ || other->lanes_[join->lane])
      break;
    auto session = other;
    leave_reactor();
    ended_ = true;
    StreamPtr lane = std::move(stream_);
    transport_.forget(this);
    session->take_lane(join->lane, std::move(lane));
    return;
  }
  end(known ? std::string(kAuthenticationFailed)
            : "a lane for a session that is not being made here; it has ended, or never was",
      true);
}

void Incoming::take_lane(uint32_t index, StreamPtr stream) {
  set_options(stream->fd(), true);
  lanes_[index] = std::move(stream);
  if (std::all_of(lanes_.begin() + 1, lanes_.end(),
                  [](const StreamPtr& lane) { return lane != nullptr; }))
    complete();
}

void Incoming::complete() {
  auto self = shared_from_this();
  const Bytes offers = encode_plain(Type::kOffer, transport_.host_.offers());
  if (!send(offers)) return end("the client does not read", false);
  leave_reactor();
  ended_ = true;
  lanes_[0] = std::move(stream_);
  Session session{
      .id = keys_.session_id, .key = keys_.session, .peer = peer_.self, .initiator = false};
  auto connection =
      std::make_shared<TcpConnection>(transport_.host_, std::move(session), std::move(lanes_));
  transport_.forget(this);
  if (transport_.host_.opened(connection)) connection->start();
}

}  // namespace kvxfer::tcp
