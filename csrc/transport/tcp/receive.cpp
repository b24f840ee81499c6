// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The receiving half of a tcp connection: one state machine per lane, on the progress thread.
// Bulk bytes go straight into place (or to the sink), never through a buffer of ours.
#include <algorithm>
#include <cerrno>

#include "common/hooks.hpp"
#include "transport/tcp/deliveries.hpp"

namespace kvxfer::tcp {
namespace {
constexpr int64_t kLastWordsNs = 20'000'000;
// An honest peer has at most kMaxInFlight requests and kReadWindow READs that want an answer, which
// make less than a fifth of it.
constexpr size_t kMaxAnswersBytes = 4 * 1024 * 1024;

Failure disconnected(const Stream& stream, int err) {
  return {.code = Code::kPeerDisconnected,
          .err = err,
          .text = err == 0 ? "the peer's process or engine ended (end of stream)"
                           : cat("the connection broke: ", stream.explain(err))};
}
}  // namespace

void TcpConnection::receive_soon(Lane& lane) {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().defer([self, &lane] { self->receive(lane); });
}

void TcpConnection::receive(Lane& lane) noexcept {
  auto taken = [this] {
    return counters.bytes_received.load(std::memory_order_relaxed) +
           counters.bytes_read.load(std::memory_order_relaxed) +
           counters.bytes_sunk.load(std::memory_order_relaxed);
  };
  const uint64_t before = taken();
  heard_ns_ = now_ns();
  lane.drained = false;
  pinged_ns_.store(0, std::memory_order_relaxed);
  Step result = Step::kAgain;
  for (int turns = 0; result == Step::kAgain; ++turns) {
    bool unread;
    {
      std::lock_guard lock(mutex_);
      if (dead_) return;
      unread = answers_nbytes_ > kMaxAnswersBytes;
    }
    if (unread) {
      protocol_error("more answers than requests may be open wait to be read");
      return;
    }
    if (lane.paused) break;
    // Edge-triggered: whoever stops before EAGAIN must come back by itself.
    if (turns >= 256 || taken() - before > kTurn) {
      receive_soon(lane);
      break;
    }
    result = step(lane);
  }
  flush_acks();
}

TcpConnection::Step TcpConnection::protocol_error(std::string text) {
  Failure failure{.code = Code::kTransport, .text = cat("protocol error: ", text)};
  enqueue(encode_failure(Type::kError, 0, failure));
  pump(*lanes_[0], 64 * 1024);
  close(failure);
  return Step::kFailed;
}

TcpConnection::Step TcpConnection::stream_ended(Lane& lane, int err) {
  if (lane.index == 0) {
    close(disconnected(*lane.stream, err));
    return Step::kFailed;
  }
  // The lanes' ends come in no order, and only lane 0 can tell the reason (BYE, ERROR): its own end
  // is on its way, or else this one's counts.
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().at(now_ns() + kLastWordsNs,
                     [self, cause = disconnected(*lane.stream, err)] { self->close(cause); });
  return Step::kFailed;
}

// At least `need` bytes in the lane's buffer. Lane 0 reads ahead; bulk lanes do not, since what
// follows is a body that belongs elsewhere.
TcpConnection::Step TcpConnection::fill(Lane& lane, size_t need) {
  while (lane.buffered() < need) {
    if (lane.begin == lane.end) lane.begin = lane.end = 0;
    if (lane.begin + need > lane.buffer.size()) {
      std::move(lane.buffer.begin() + static_cast<ptrdiff_t>(lane.begin),
                lane.buffer.begin() + static_cast<ptrdiff_t>(lane.end), lane.buffer.begin());
      lane.end -= lane.begin;
      lane.begin = 0;
      // need was checked against kMaxControlBytes before it came here.
      if (need > lane.buffer.size()) lane.buffer.resize(need);
    }
    const size_t want = lane.index == 0 ? lane.buffer.size() - lane.end : need - lane.buffered();
    if (lane.drained) return Step::kBlocked;
    const iovec into{lane.buffer.data() + lane.end, want};
    const ssize_t n = lane.stream->receive({&into, 1});
    if (n > 0) {
      lane.end += static_cast<size_t>(n);
      lane.drained = static_cast<size_t>(n) < want && lane.stream->shared() &&  // of a bare socket
                     !lane.hung_up;
    } else if (n == 0) {
      return stream_ended(lane, 0);
    } else if (errno == EAGAIN) {
      return Step::kBlocked;
    } else if (errno != EINTR) {
      return stream_ended(lane, errno);
    }
  }
  return Step::kAgain;
}

TcpConnection::Step TcpConnection::step(Lane& lane) {
  using Phase = Lane::Phase;
  switch (lane.phase) {
    case Phase::kHead: {
      if (Step s = fill(lane, kHeadBytes); s != Step::kAgain) return s;
      const auto head =
          decode_head({lane.buffer.data() + lane.begin, kHeadBytes}, kMaxControlBytes);
      if (!head) return protocol_error("bad frame head");
      lane.begin += kHeadBytes;
      lane.head = *head;
      return on_head(lane);
    }
    case Phase::kControl: {
      const size_t nbytes = lane.head.control_nbytes;
      if (Step s = fill(lane, nbytes); s != Step::kAgain) return s;
      const ByteView control{lane.buffer.data() + lane.begin, nbytes};
      lane.phase = Phase::kHead;
      const Step s = on_control(lane, control);
      if (s == Step::kFailed) return s;
      if (lane.paused)
        lane.phase = Phase::kControl;  // the same control bytes again, when it goes on
      else
        lane.begin += nbytes;
      return s;
    }
    case Phase::kBody:
      return receive_body(lane);
    case Phase::kTrailer: {
      if (Step s = fill(lane, kTrailerBytes); s != Step::kAgain) return s;
      const auto code = decode_trailer({lane.buffer.data() + lane.begin, kTrailerBytes});
      if (!code) return protocol_error("bad stripe trailer");
      lane.begin += kTrailerBytes;
      lane.phase = Phase::kHead;
      return lane.head.type == Type::kStripe ? on_stripe_end(lane, *code)
                                             : on_read_data_end(lane, *code);
    }
  }
  return Step::kFailed;
}

TcpConnection::Step TcpConnection::on_head(Lane& lane) {
  const bool has_body = lane.head.type == Type::kStripe || lane.head.type == Type::kReadData;
  if (!has_body && lane.head.body_nbytes != 0) return protocol_error("unexpected body");
  const bool data = has_body || lane.head.type == Type::kAbort;
  if (lane.index != 0 && !data) return protocol_error("control frame on a bulk lane");
  lane.phase = Lane::Phase::kControl;
  if (has_body) lane.last_control = lane.head.control_nbytes;
  return Step::kAgain;
}

TcpConnection::Step TcpConnection::on_control(Lane& lane, ByteView control) {
  switch (lane.head.type) {
    case Type::kStripe:
      return on_stripe(lane, control);
    case Type::kRead:
      return on_read(lane, control);
    case Type::kReadData:
      return on_read_data(lane, control);
    case Type::kAck:
      return on_acks(control);
    case Type::kRefuse:
      return on_refuse(lane, control);
    case Type::kAbort:
      return on_abort(lane);
    case Type::kControl:
      return host_.control(*this, control) ? Step::kAgain
                                           : protocol_error("malformed control payload");
    case Type::kReady:
      host_.ready(*this);
      return Step::kAgain;
    case Type::kPing:
      answer(encode_plain(Type::kPong, {}));
      return Step::kAgain;
    case Type::kPong:  // that it came is all it says
      return Step::kAgain;
    case Type::kBye:
      close({.code = Code::kPeerDisconnected, .text = "the peer closed its engine"});
      return Step::kFailed;
    case Type::kError: {
      auto failure = decode_failure(control);
      close({.code = Code::kPeerDisconnected,
             .text = cat("the peer ended the connection: ",
                         failure ? failure->text : "no reason given")});
      return Step::kFailed;
    }
    default:
      if (lane.head.flags & kMaySkip) return Step::kAgain;
      return protocol_error(cat("unknown frame type ", static_cast<int>(lane.head.type)));
  }
}

// ---------------------------------------------------------------- bodies

// One system call (or a copy of what was read ahead) into place, or to nowhere.
ssize_t TcpConnection::store_body(Lane& lane, bool store, int& err) {
  iovec iov[kMaxIov];
  if (lane.buffered() > 0) {
    const size_t have = static_cast<size_t>(std::min<uint64_t>(lane.buffered(), lane.body.left));
    const size_t count = store ? lane.body.gather(iov, kMaxIov, have) : 0;
    const std::byte* from = lane.buffer.data() + lane.begin;
    ssize_t n = store ? 0 : static_cast<ssize_t>(have);
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(iov[i].iov_base, from + n, iov[i].iov_len);
      n += static_cast<ssize_t>(iov[i].iov_len);
    }
    lane.begin += static_cast<size_t>(n);
    return n;
  }
  ssize_t n;
  if (store) {
    lane.begin = lane.end = 0;
    size_t count = lane.body.gather(iov, kMaxIov - 1, ~uint64_t{0});
    uint64_t asked = 0;
    for (size_t i = 0; i < count; ++i) asked += iov[i].iov_len;
    // The trailer, the next head and, as stripes of one request are alike, all of its control bytes
    // come along if they are there: no system call is left that moves only those.
    const size_t tail = kTrailerBytes + kHeadBytes + lane.last_control;
    if (asked == lane.body.left)
      iov[count++] = {lane.buffer.data(), std::min(tail, lane.buffer.size())};
    n = lane.stream->receive({iov, count});
    err = errno;
    if (n > static_cast<ssize_t>(asked)) {
      lane.end = static_cast<size_t>(n) - static_cast<size_t>(asked);
      n = static_cast<ssize_t>(asked);
    }
  } else {
    n = lane.stream->drop(static_cast<size_t>(lane.body.left));
    err = errno;
  }
  return n;
}

TcpConnection::Step TcpConnection::receive_body(Lane& lane) {
  if (lane.head.body_nbytes == 0) {
    lane.phase = Lane::Phase::kTrailer;
    return Step::kAgain;
  }
  while (lane.body.left > 0) {
    // May it still be stored? A write: the owner's gates. A read of ours: it has not ended.
    Inbound* inbound = lane.inbound.get();
    bool store = true;
    if (inbound != nullptr) {
      store = !inbound->verdict && !inbound->aborted;
      if (store && !inbound->landing.enter()) {
        refuse(lane.head.request, *inbound, inbound->landing.closed());
        store = false;
      }
    } else {
      std::lock_guard lock(mutex_);
      store = lane.reading && lane.reading->ending == Flight::Ending::kNone &&
              flights_.contains(lane.head.request);
      if (store) ++lane.reading->busy;
    }
    if (store)
      hooks::reached(inbound != nullptr ? hooks::Point::kInsideChunk : hooks::Point::kInsideRead);
    int err = 0;
    const ssize_t n = store_body(lane, store, err);
    if (store && inbound != nullptr) inbound->landing.leave();
    if (store && inbound == nullptr) {
      Deliveries deliveries;
      {
        std::lock_guard lock(mutex_);
        if (--lane.reading->busy == 0) deliveries.add(*lane.reading);
      }
      deliver(deliveries);
    }
    if (n > 0) {
      lane.body.advance(static_cast<uint64_t>(n));
      auto& counter = !store               ? counters.bytes_sunk
                      : inbound != nullptr ? counters.bytes_received
                                           : counters.bytes_read;
      counter.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
      if (lane.body.left > 0 && lane.index != 0) continue;
    } else if (n == 0) {
      return stream_ended(lane, 0);
    } else if (err == EAGAIN) {
      return Step::kBlocked;
    } else if (err != EINTR) {
      return stream_ended(lane, err);
    }
  }
  lane.phase = Lane::Phase::kTrailer;
  return Step::kAgain;
}

}  // namespace kvxfer::tcp
