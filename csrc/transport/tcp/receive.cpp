// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The receiving half of a tcp connection: one state machine per lane, on the progress thread.
// Bulk bytes go straight into place (or to the sink), never through a buffer of ours.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "common/hooks.hpp"
#include "transport/tcp/connection_impl.hpp"

namespace kvxfer::tcp {
namespace {
constexpr uint64_t kTurn = 2 * 1024 * 1024;  // then the other lanes get a look
constexpr size_t kMaxIov = 1024;
constexpr int64_t kLastWordsNs = 20'000'000;

Failure disconnected(int err) {
  return {.code = Code::kPeerDisconnected,
          .err = err,
          .text = err == 0 ? "the peer's process or engine ended (end of stream)"
                           : cat("the connection broke: ", errno_text(err))};
}
}  // namespace

void TcpConnection::receive(Lane& lane) noexcept {
  auto taken = [this] {
    return counters.bytes_received.load(std::memory_order_relaxed) +
           counters.bytes_read.load(std::memory_order_relaxed) +
           counters.bytes_sunk.load(std::memory_order_relaxed);
  };
  const uint64_t before = taken();
  Step result = Step::kAgain;
  for (int turns = 0; result == Step::kAgain; ++turns) {
    {
      std::lock_guard lock(mutex_);
      if (dead_) return;
    }
    if (lane.paused) break;
    // Edge-triggered: whoever stops before EAGAIN must come back by itself.
    if (turns >= 256 || taken() - before > kTurn) {
      auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
      host_.reactor().defer([self, &lane] { self->receive(lane); });
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
    close(disconnected(err));
    return Step::kFailed;
  }
  // The lanes' ends come in no order, and only lane 0 can tell the reason (BYE, ERROR): its own end
  // is on its way, or else this one's counts.
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().at(now_ns() + kLastWordsNs, [self, err] { self->close(disconnected(err)); });
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
    const ssize_t n = ::recv(lane.fd.get(), lane.buffer.data() + lane.end, want, MSG_DONTWAIT);
    if (n > 0) {
      lane.end += static_cast<size_t>(n);
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
  lane.phase = Phase::kControl;
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
    case Type::kRefuse:
      return on_verdicts(lane, control);
    case Type::kAbort:
      return on_abort(lane);
    case Type::kControl:
      return host_.control(*this, control) ? Step::kAgain
                                           : protocol_error("malformed control payload");
    case Type::kReady:
      host_.ready(*this);
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

TcpConnection::Step TcpConnection::receive_body(Lane& lane) {
  if (lane.head.body_nbytes == 0) {
    lane.phase = Phase::kTrailer;
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
    ssize_t n;
    int err = 0;
    if (lane.buffered() > 0) {  // lane 0 read ahead
      const size_t have = static_cast<size_t>(std::min<uint64_t>(lane.buffered(), lane.body.left));
      iovec iov[kMaxIov];
      const size_t count = store ? lane.body.gather(iov, kMaxIov, have) : 0;
      const std::byte* from = lane.buffer.data() + lane.begin;
      n = store ? 0 : static_cast<ssize_t>(have);
      for (size_t i = 0; i < count; ++i) {
        std::memcpy(iov[i].iov_base, from + n, iov[i].iov_len);
        n += static_cast<ssize_t>(iov[i].iov_len);
      }
      lane.begin += static_cast<size_t>(n);
    } else if (store) {
      iovec iov[kMaxIov];
      lane.begin = lane.end = 0;
      size_t count = lane.body.gather(iov, kMaxIov - 1, ~uint64_t{0});
      uint64_t asked = 0;
      for (size_t i = 0; i < count; ++i) asked += iov[i].iov_len;
      // The trailer and the next head come along, if they are there: one system call less.
      if (asked == lane.body.left) iov[count++] = {lane.buffer.data(), kTrailerBytes + kHeadBytes};
      msghdr message{};
      message.msg_iov = iov;
      message.msg_iovlen = count;
      n = ::recvmsg(lane.fd.get(), &message, MSG_DONTWAIT);
      err = errno;
      if (n > static_cast<ssize_t>(asked)) {
        lane.end = static_cast<size_t>(n) - static_cast<size_t>(asked);
        n = static_cast<ssize_t>(asked);
      }
    } else {
      // MSG_TRUNC on a TCP socket drops the bytes in the kernel, uncopied.
      n = ::recv(lane.fd.get(), nullptr, static_cast<size_t>(lane.body.left),
                 MSG_DONTWAIT | MSG_TRUNC);
      err = errno;
    }
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
  lane.phase = Phase::kTrailer;
  return Step::kAgain;
}

// ---------------------------------------------------------------- the peer writes

TcpConnection::Step TcpConnection::on_stripe(Lane& lane, ByteView control) {
  // A retry must not be overtaken by its cancelled predecessor's padding on another lane.
  auto missing = [&lane](const Lane& other) {
    return static_cast<int32_t>(lane.head.cancel_count - other.aborts_seen) > 0;
  };
  if (missing(lane)) return protocol_error("a stripe names an ABORT that was never sent");
  for (auto& other : lanes_) {
    if (!missing(*other)) continue;
    lane.paused = true;
    return Step::kAgain;
  }
  StripeHead& stripe = lane.stripe;
  if (!decode_stripe(lane.head, control, stripe)) return protocol_error("malformed STRIPE");
  auto [it, inserted] = inbound_.try_emplace(lane.head.request);
  if (inserted) {
    if (inbound_.size() > 2 * kMaxInFlight) return protocol_error("too many requests in flight");
    it->second = std::make_shared<Inbound>();
  }
  lane.inbound = it->second;
  Inbound& inbound = *lane.inbound;
  if (!inbound.seen) {
    inbound.seen = true;
    inbound.op = stripe.access.op;
    inbound.total = stripe.total_nbytes;
    if (!inbound.aborted) {
      if (auto failure = host_.admit(*this, stripe.access, inbound.landing))
        refuse(lane.head.request, inbound, *failure);
    }
  } else if (inbound.total != stripe.total_nbytes || inbound.op != stripe.access.op) {
    return protocol_error("stripes of one request disagree");
  }
  if (stripe.has_notify) {
    if (inbound.arrival.has_notify) return protocol_error("two notifications in one request");
    inbound.arrival.has_notify = true;
    inbound.arrival.notify.assign(stripe.notify.begin(), stripe.notify.end());
  }
  inbound.arrival.has_arrival = stripe.has_arrival;
  inbound.arrival.arrival = stripe.arrival;
  const bool sink = inbound.verdict || inbound.aborted;
  if (!sink && !stripe.targets.empty()) {
    if (auto failure = inbound.landing.check(stripe.targets, stripe.first_target))
      refuse(lane.head.request, inbound, *failure);
  }
  lane.body.clear();
  lane.reading.reset();
  if (inbound.verdict || inbound.aborted) {
    lane.body.add(nullptr, lane.head.body_nbytes);
  } else {
    for (const Target& t : stripe.targets)
      inbound.landing.region->resolve(t.offset, t.nbytes,
                                      [&](std::byte* base, size_t n) { lane.body.add(base, n); });
  }
  lane.phase = Phase::kBody;
  return Step::kAgain;
}

TcpConnection::Step TcpConnection::on_stripe_end(Lane& lane, Code trailer) {
  InboundPtr inbound = std::move(lane.inbound);
  lane.inbound.reset();
  if (inbound->verdict || inbound->aborted) return Step::kAgain;  // ABORT makes us forget it
  if (trailer != Code::kOk) {
    inbound->verdict = true;  // its ABORT follows, on every lane
    refuse(lane.head.request, *inbound,
           {.code = Code::kCancelled, .text = "cancelled by its initiator"});
    return Step::kAgain;
  }
  inbound->landed += lane.head.body_nbytes;
  if (inbound->landed > inbound->total) return protocol_error("more bytes than the request has");
  if (inbound->landed < inbound->total) return Step::kAgain;
  inbound->arrival.nbytes = inbound->total;
  if (auto failure = host_.accept(*this, inbound->landing, std::move(inbound->arrival))) {
    refuse(lane.head.request, *inbound, *failure);
    return Step::kAgain;
  }
  counters.requests_served.fetch_add(1, std::memory_order_relaxed);
  inbound_.erase(lane.head.request);
  acks_.push_back(lane.head.request);
  if (acks_.size() >= 1024) flush_acks();
  return Step::kAgain;
}

// Told at once; the record stays until the initiator's ABORT, and its bytes go to the sink.
void TcpConnection::refuse(uint64_t request, Inbound& inbound, const Failure& failure) {
  inbound.verdict = true;
  if (failure.code != Code::kCancelled) counters.refused.fetch_add(1, std::memory_order_relaxed);
  enqueue(encode_failure(Type::kRefuse, request, failure));
}

void TcpConnection::flush_acks() {
  if (acks_.empty()) return;
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    queue_locked(0, encode_acks(acks_));
  }
  acks_.clear();
  pump(*lanes_[0], 64 * 1024);
}

TcpConnection::Step TcpConnection::on_abort(Lane& lane) {
  if (lane.head.cancel_count != lane.aborts_seen + 1) return protocol_error("ABORTs out of order");
  lane.aborts_seen = lane.head.cancel_count;
  auto [it, inserted] = inbound_.try_emplace(lane.head.request);
  if (inserted) {
    if (inbound_.size() > 4 * kMaxInFlight) return protocol_error("too many aborts in flight");
    it->second = std::make_shared<Inbound>();
  }
  InboundPtr inbound = it->second;
  inbound->aborted = true;
  if (++inbound->num_aborts == lanes_.size()) {
    // Accepted or refused before: it was told. Else the initiator learns that it never landed.
    if (inbound->seen && !inbound->verdict)
      refuse(lane.head.request, *inbound,
             {.code = Code::kCancelled, .text = "cancelled by its initiator"});
    inbound_.erase(lane.head.request);
  }
  {
    std::lock_guard lock(mutex_);
    for (Serve& serve : serves_)
      if (serve.request == lane.head.request) serve.dropped = true;
  }
  for (auto& other : lanes_) {
    if (!other->paused) continue;
    other->paused = false;
    auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
    host_.reactor().defer([self, &other = *other] { self->receive(other); });
  }
  return Step::kAgain;
}

// ---------------------------------------------------------------- the peer reads

TcpConnection::Step TcpConnection::on_read(Lane& lane, ByteView control) {
  if (!decode_stripe(lane.head, control, lane.stripe)) return protocol_error("malformed READ");
  Serve serve;
  serve.request = lane.head.request;
  serve.stripe = lane.stripe.stripe;
  auto failure = host_.admit(*this, lane.stripe.access, serve.landing);
  if (!failure) failure = serve.landing.check(lane.stripe.targets, lane.stripe.first_target);
  bool too_many;
  {
    std::lock_guard lock(mutex_);
    if (dead_) return Step::kFailed;
    too_many = serves_pending_ >= 2 * kReadWindow;
    if (failure) {
      // On lane 0 behind the verdict, so that the count of outstanding reads comes back in order.
      queue_locked(0, encode_failure(Type::kRefuse, serve.request, *failure));
      Frame frame;
      frame.head = encode_read_data(serve.request, serve.stripe, 0);
      frame.has_trailer = true;
      write_trailer(failure->code, frame.trailer.data());
      lanes_[0]->queue.push_back(std::move(frame));
    } else if (!too_many) {
      ++serves_pending_;
      serve.targets = std::move(lane.stripe.targets);
      serves_.push_back(std::move(serve));
    }
  }
  if (too_many) return protocol_error("too many reads in flight");
  if (failure) {
    counters.refused.fetch_add(1, std::memory_order_relaxed);
    pump_soon(*lanes_[0]);
  } else {
    counters.requests_served.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 1; i < lanes_.size(); ++i) pump_soon(*lanes_[i]);
  }
  return Step::kAgain;
}

TcpConnection::Step TcpConnection::on_read_data(Lane& lane, ByteView control) {
  Reader r(control);
  const uint32_t stripe = r.u32();
  if (!r.finished()) return protocol_error("malformed READ_DATA");
  lane.body.clear();
  lane.inbound.reset();
  lane.reading.reset();
  bool ours = false, expected;
  {
    std::lock_guard lock(mutex_);
    expected = reads_outstanding_ > 0;
    if (expected) --reads_outstanding_;
    if (auto it = flights_.find(lane.head.request); it != flights_.end()) {
      auto record = it->second->reads.find(stripe);
      expected = expected && record != it->second->reads.end();
      if (expected) {
        lane.reading = it->second;
        lane.read_stripe = record->second;
        lane.reading->reads.erase(record);
        ours = true;
      }
    }
    cut_reads();
  }
  if (!expected) return protocol_error("READ_DATA that nobody asked for");
  if (ours && lane.head.body_nbytes != 0 && lane.head.body_nbytes != lane.read_stripe.nbytes)
    return protocol_error("READ_DATA of the wrong length");
  if (ours && lane.head.body_nbytes != 0) {
    const Request& request = *lane.reading->request;
    uint64_t left = lane.read_stripe.nbytes, skip = lane.read_stripe.offset;
    for (size_t i = lane.read_stripe.span; left > 0; ++i, skip = 0) {
      const Span& span = request.spans[i];
      const uint64_t n = std::min<uint64_t>(left, span.nbytes - skip);
      request.local->resolve(span.local + skip, n,
                             [&](std::byte* base, size_t size) { lane.body.add(base, size); });
      left -= n;
    }
  } else if (lane.head.body_nbytes != 0) {
    lane.body.add(nullptr, lane.head.body_nbytes);
  }
  lane.phase = Phase::kBody;
  pump_soon(*lanes_[0]);  // further READs
  return Step::kAgain;
}

TcpConnection::Step TcpConnection::on_read_data_end(Lane& lane, Code trailer) {
  FlightPtr flight = std::move(lane.reading);
  lane.reading.reset();
  if (!flight) return Step::kAgain;
  Deliveries deliveries;
  bool aborted = false;
  {
    std::lock_guard lock(mutex_);
    if (!flights_.contains(flight->request->id)) return Step::kAgain;
    Completion completion;
    if (trailer != Code::kOk || lane.head.body_nbytes == 0) {
      completion.ok = false;
      completion.nbytes = flight->landed;
      completion.failure = {.code = trailer == Code::kOk ? Code::kRemoteAccess : trailer,
                            .text = "the lease or region was closed while it was being read"};
      abort_locked(flight);
      aborted = true;
      finish(flight, Flight::Ending::kEnd, std::move(completion), deliveries);
    } else {
      flight->landed += lane.head.body_nbytes;
      completion.nbytes = flight->landed;
      if (flight->landed == flight->request->nbytes)
        finish(flight, Flight::Ending::kEnd, std::move(completion), deliveries);
    }
    room_locked(deliveries);
  }
  deliver(deliveries);
  if (aborted)
    for (auto& each : lanes_) pump_soon(*each);
  return Step::kAgain;
}

// ---------------------------------------------------------------- verdicts on our requests

TcpConnection::Step TcpConnection::on_verdicts(Lane& lane, ByteView control) {
  Deliveries deliveries;
  bool aborted = false;
  if (lane.head.type == Type::kAck) {
    if (control.size() % sizeof(uint64_t) != 0) return protocol_error("malformed ACK");
    Reader r(control);
    bool early = false;
    std::unique_lock lock(mutex_);
    while (r.remaining() > 0) {
      const uint64_t id = r.u64();
      if (zombies_.erase(id) != 0) continue;  // it had landed after all: the target's counts say so
      auto it = flights_.find(id);
      if (it == flights_.end()) continue;
      FlightPtr flight = it->second;
      if (!flight->cut_all || flight->request->op == Op::kRead) {
        early = true;
        break;
      }
      counters.bytes_written.fetch_add(flight->request->nbytes, std::memory_order_relaxed);
      finish(flight, Flight::Ending::kEnd,
             {.ok = true, .nbytes = flight->request->nbytes, .failure = {}}, deliveries);
    }
    room_locked(deliveries);
    lock.unlock();
    if (early) return protocol_error("ACK of a request that was not sent");
  } else {
    auto failure = decode_failure(control);
    if (!failure) return protocol_error("malformed REFUSE");
    std::lock_guard lock(mutex_);
    if (auto zombie = zombies_.find(lane.head.request); zombie != zombies_.end()) {
      deliveries.unshown.push_back(zombie->second);
      zombies_.erase(zombie);
    } else if (auto it = flights_.find(lane.head.request); it != flights_.end()) {
      FlightPtr flight = it->second;
      const Request& request = *flight->request;
      // The owner counts descriptors; the caller counts what it passed in.
      if (failure->span != kNoSpan)
        failure->span =
            failure->span < request.spans.size() ? request.spans[failure->span].index : kNoSpan;
      abort_locked(flight);
      aborted = true;
      finish(flight, Flight::Ending::kEnd,
             {.ok = false, .nbytes = flight->landed, .failure = *failure}, deliveries);
    }
    room_locked(deliveries);
  }
  deliver(deliveries);
  if (aborted)
    for (auto& each : lanes_) pump_soon(*each);
  return Step::kAgain;
}

}  // namespace kvxfer::tcp
