// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/transport.hpp"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "common/random.hpp"
#include "transport/tcp/incoming.hpp"

namespace kvxfer::tcp {

struct TcpTransport::Acceptor final : FdHandler {
  explicit Acceptor(TcpTransport& t) : transport(t) {}
  void on_events(uint32_t) override { transport.accept_all(); }
  TcpTransport& transport;
};

TcpTransport::TcpTransport(SessionHost& host, Bytes secret, const TransportConfig& config)
    : host_(host), secret_(std::move(secret)), config_(config), tls_(TlsContext::make(config)) {}

TcpTransport::~TcpTransport() = default;

std::string TcpTransport::listen(const std::string& address, bool* loopback) {
  listener_ = tcp::listen(address);
  *loopback = listener_.loopback;
  return listener_.address;
}

void TcpTransport::start() {
  token_ = host_.reactor().add(listener_.fd.get(), EPOLLIN, std::make_shared<Acceptor>(*this));
}

void TcpTransport::stop() noexcept {
  incoming_.clear();
  listener_.fd.reset();
}

Hello TcpTransport::hello() const {
  Hello hello;
  hello.num_lanes = config_.num_lanes;
  hello.self = host_.self();
  hello.nonce = random_bytes<32>();
  return hello;
}

void TcpTransport::accept_all() noexcept {
  // Bounded, so that a flood of clients does not starve the peers; level-triggered brings us back.
  for (int i = 0; i < 16; ++i) {
    Fd fd(::accept4(listener_.fd.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        // The queue stays readable and there is nothing to accept with: look again when a
        // descriptor may have come free, rather than spinning.
        host_.turned_away("?", cat("cannot accept: ", errno_text(errno)));
        host_.reactor().remove(token_, listener_.fd.get());
        host_.reactor().at(deadline_after(0.1), [this] { start(); });
      }
      return;
    }
    try {
      take(std::move(fd));
    } catch (const std::exception& error) {
      host_.turned_away("?", error.what());
    }
  }
}

std::shared_ptr<FdHandler> TcpTransport::take(Fd fd) {
  if (incoming_.size() >= kMaxHalfOpen) {
    // The oldest of those that have proved nothing gives way: a flood of silent clients must not
    // keep an honest one out.
    auto oldest = std::min_element(incoming_.begin(), incoming_.end(), [](auto& a, auto& b) {
      return std::pair{a.second->has_proved(), a.second->serial()} <
             std::pair{b.second->has_proved(), b.second->serial()};
    });
    auto victim = oldest->second;
    victim->give_way(
        cat("too many connections are being made at once (", kMaxHalfOpen, "); connect again"));
  }
  set_options(fd.get(), false);
  auto incoming = std::make_shared<Incoming>(*this, std::move(fd), next_serial_++);
  incoming_.emplace(incoming.get(), incoming);
  incoming->start();
  return incoming;
}

void TcpTransport::forget(Incoming* incoming) noexcept { incoming_.erase(incoming); }

// Through the TLS handshake, where there is one.
StreamPtr TcpTransport::secure(Fd fd, const Patience& patience) const {
  if (!tls_) return std::make_unique<Stream>(std::move(fd));
  auto stream = tls_->wrap(std::move(fd), false);
  for (;;) {
    switch (stream->handshake()) {
      case TlsStream::Progress::kDone:
        return stream;
      case TlsStream::Progress::kFailed:
        fail(Code::kTransport, stream->explain(EPROTO));
      case TlsStream::Progress::kWaiting:
        if (!patience.wait(stream->fd(), POLLIN))
          fail(Code::kTimeout, "the other side did not answer in the TLS handshake in time");
    }
  }
}

TcpTransport::Established TcpTransport::connect(const std::string& address,
                                                const Patience& patience, const Wanted& wanted) {
  Fd first = tcp::connect(address, patience, false);  // its errors name the address already
  const auto dial = [&](bool bulk) {
    return secure(bulk ? tcp::connect(address, patience, true) : std::move(first), patience);
  };
  try {
    return establish(dial, patience, wanted);
  } catch (const Error& error) {
    throw Error(error.code, cat("connecting to ", address, " failed: ", error.what()), error.err,
                "tcp", address);
  }
}

TcpTransport::Established TcpTransport::establish(const Dial& dial, const Patience& patience,
                                                  const Wanted& wanted) {
  std::vector<StreamPtr> lanes;
  Bytes frame;
  auto read_frame = [&](Type expected) {
    frame.resize(kHeadBytes);
    read_exact(*lanes[0], frame, patience);
    const auto head = decode_handshake_head(frame);
    if (!head)
      fail(Code::kTransport,
           "what listens there is not a kvxfer engine, or one of another version");
    frame.resize(kHeadBytes + head->control_nbytes);
    read_exact(*lanes[0], std::span(frame).subspan(kHeadBytes), patience);
    const ByteView control = ByteView(frame).subspan(kHeadBytes);
    if (head->type == Type::kError) {
      const auto failure = decode_failure(control);
      fail(Code::kTransport, failure ? failure->text : "refused without a reason");
    }
    if (head->type != expected) fail(Code::kTransport, "handshake frames out of order");
    return control;
  };
  lanes.push_back(dial(false));
  const Hello ours = hello();
  Transcript transcript;
  transcript.add(lanes[0]->binding());
  const Bytes opening = encode_hello(ours);
  transcript.add(opening);
  write_all(*lanes[0], opening, patience);
  const auto theirs = decode_hello(read_frame(Type::kHello));
  if (!theirs || theirs->min_version != kVersion || theirs->max_version != kVersion ||
      theirs->num_lanes > config_.num_lanes)
    fail(Code::kTransport, "malformed HELLO");
  transcript.add(frame);
  const Keys keys = derive_keys(secret_, ours, *theirs);
  const Bytes auth = encode_plain(Type::kAuth, client_proof(keys, transcript));
  transcript.add(auth);
  write_all(*lanes[0], auth, patience);
  const Digest expected = server_proof(keys, transcript);
  if (!equal_constant_time(read_frame(Type::kAuth), expected))
    fail(Code::kTransport, kAuthenticationFailed);
  if (!wanted(theirs->self)) return {};
  Session session{
      .id = keys.session_id, .key = keys.session, .peer = theirs->self, .initiator = true};
  for (uint32_t lane = 1; lane <= theirs->num_lanes; ++lane) {
    Stream& stream = *lanes.emplace_back(dial(true));
    const Digest proof = lane_proof(session.key, session.id, lane, stream.binding());
    write_all(stream, encode_join({session.id, lane, proof}), patience);
  }
  const ByteView offers = read_frame(Type::kOffer);
  Established out;
  out.offers.assign(offers.begin(), offers.end());
  out.connection = std::make_shared<TcpConnection>(host_, std::move(session), std::move(lanes));
  return out;
}

}  // namespace kvxfer::tcp
