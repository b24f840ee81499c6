// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The life and the sending half of a tcp connection; receive.cpp is the other half.
#include "transport/tcp/connection.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "transport/tcp/connection_impl.hpp"
#include "transport/tcp/socket.hpp"

namespace kvxfer::tcp {
namespace {
// A caller of post() sends small requests itself and leaves bulk to the progress thread: copying a
// gigabyte into a socket is no work for the thread that computes the next layer.
constexpr size_t kCallerBudget = 64 * 1024;
constexpr size_t kTurn = 1024 * 1024;  // then the progress thread looks at the other lanes
constexpr size_t kMaxIov = 1024;
constexpr int64_t kGoodbyeNs = 5'000'000;
alignas(64) std::byte padding[64 * 1024];  // zeros, sent in place of bytes that must not be read
}  // namespace

struct TcpConnection::LaneHandler final : FdHandler {
  LaneHandler(std::shared_ptr<TcpConnection> owner, Lane& l)
      : connection(std::move(owner)), lane(l) {}
  void on_events(uint32_t events) override {
    if (events & EPOLLOUT) connection->pump(lane, kTurn);
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) connection->receive(lane);
  }
  std::shared_ptr<TcpConnection> connection;  // the reactor's reference, dropped by remove()
  Lane& lane;
};

TcpConnection::TcpConnection(SessionHost& host, Session session, std::vector<Fd> lanes)
    : Connection("tcp"), host_(host), session_(std::move(session)) {
  for (Fd& fd : lanes) {
    auto lane = std::make_unique<Lane>();
    lane->index = static_cast<uint32_t>(lanes_.size());
    lane->fd = std::move(fd);
    lane->buffer.resize(lane->index == 0 ? 16 * 1024 : 4 * 1024);
    lanes_.push_back(std::move(lane));
  }
}

TcpConnection::~TcpConnection() = default;

void TcpConnection::start() {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  {
    std::lock_guard lock(mutex_);
    started_ = true;
  }
  for (auto& lane : lanes_)
    lane->token = host_.reactor().add(lane->fd.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                      std::make_shared<LaneHandler>(self, *lane));
}

bool TcpConnection::same_host() const noexcept { return tcp::same_host(lanes_[0]->fd.get()); }

std::string TcpConnection::describe() const {
  return cat("tcp: ", peer_address(lanes_[0]->fd.get()), ", 1 control lane + ", lanes_.size() - 1,
             " bulk lane(s)");
}

// ---------------------------------------------------------------- post, cancel, close

Status TcpConnection::post(const RequestPtr& request) noexcept {
  bool small;
  {
    std::lock_guard lock(mutex_);
    if (dead_) return {Code::kPeerDisconnected, cause_.err};
    if (flights_.size() + zombies_.size() >= kMaxInFlight) {
      want_room_ = true;
      return {Code::kAgain};
    }
    auto flight = std::make_shared<Flight>();
    flight->request = request;
    flights_.emplace(request->id, flight);
    small = request->op != Op::kRead && request->nbytes <= kSmallBytes &&
            request->spans.size() <= kMaxPieces;
    if (request->op == Op::kRead) {
      read_jobs_.push_back(flight);
      cut_reads();
      small = true;  // the asking is small
    } else {
      (small ? small_jobs_ : bulk_jobs_).push_back(flight);
    }
  }
  counters.requests.fetch_add(1, std::memory_order_relaxed);
  if (small) {
    pump(*lanes_[0], kCallerBudget);
  } else {
    for (size_t i = 1; i < lanes_.size(); ++i) pump_soon(*lanes_[i]);
  }
  return {};
}

Cancelled TcpConnection::cancel(const RequestPtr& request) noexcept {
  Deliveries deliveries;
  Cancelled result;
  bool begun;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(request->id);
    if (it == flights_.end()) return {Agreement::kEnding, false};
    FlightPtr flight = it->second;
    // A read's destination is ours: what we throw away can never be accepted.
    result.agreement =
        flight->begun && request->op != Op::kRead ? Agreement::kUnknown : Agreement::kStopped;
    result.quiesced = flight->busy == 0;
    begun = flight->begun;
    if (begun) {
      abort_locked(flight);
      if (request->op != Op::kRead) zombies_.emplace(request->id, request);
    }
    finish(flight, result.quiesced ? Flight::Ending::kNone : Flight::Ending::kQuiesce, {},
           deliveries);
    room_locked(deliveries);
  }
  deliver(deliveries);
  if (begun)
    for (auto& lane : lanes_) pump_soon(*lane);
  return result;
}

// The owner must forget the request, and nothing that we post later may be overtaken by its rest:
// ABORT goes down every lane, behind the frame that each is in the middle of.
void TcpConnection::abort_locked(const FlightPtr& flight) {
  for (auto& lane : lanes_)
    if (lane->current && lane->current->flight == flight) lane->current->spoil(Code::kCancelled);
  ++cancel_count_;
  for (auto& lane : lanes_)
    queue_locked(lane->index, encode_abort(flight->request->id, cancel_count_));
}

void TcpConnection::close(const Failure& cause) noexcept {
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    if (started_ && cause.code == Code::kCancelled) queue_locked(0, encode_plain(Type::kBye, {}));
  }
  if (cause.code == Code::kCancelled) {
    // The goodbye must be out before the sockets are shut. Another thread may hold the lane's
    // sending token; it is inside a non-blocking call, and a full pipe is not waited for.
    pump(*lanes_[0], kCallerBudget);
    for (const int64_t until = now_ns() + kGoodbyeNs; now_ns() < until; std::this_thread::yield()) {
      std::lock_guard lock(mutex_);
      if (!lanes_[0]->sending) break;
    }
  }
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    dead_ = true;
    cause_ = cause;
    for (auto& lane : lanes_) ::shutdown(lane->fd.get(), SHUT_RDWR);
  }
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().post([self] { self->buried(); });
}

// On the progress thread, once, after dead_ was set: no callback of a lane is running.
void TcpConnection::buried() noexcept {
  for (auto& lane : lanes_)
    if (lane->token != 0) host_.reactor().remove(lane->token, lane->fd.get());
  inbound_.clear();
  Deliveries deliveries;
  {
    std::lock_guard lock(mutex_);
    auto flights = flights_;
    for (auto& [id, flight] : flights)
      finish(flight, Flight::Ending::kEnd,
             {.ok = false, .nbytes = flight->landed, .failure = cause_, .agreed = !flight->begun},
             deliveries);
    zombies_.clear();
    small_jobs_.clear(), bulk_jobs_.clear(), read_jobs_.clear();
    serves_.clear();
    for (auto& lane : lanes_) {
      lane->queue.clear();
      lane->inbound.reset();
      lane->reading.reset();
      if (!lane->sending) lane->current.reset();
    }
  }
  deliver(deliveries);
  host_.lost(*this, cause_);
}

void TcpConnection::join() noexcept {
  // System calls here are non-blocking, so whoever holds a token gives it back within one of them.
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (std::ranges::none_of(lanes_, [](auto& lane) { return lane->sending; })) return;
    }
    std::this_thread::yield();
  }
}

// ---------------------------------------------------------------- ends

void TcpConnection::finish(const FlightPtr& flight, Flight::Ending ending, Completion completion,
                           Deliveries& out) {
  if (flights_.erase(flight->request->id) == 0) return;  // it has ended before
  flight->ending = ending;
  flight->completion = std::move(completion);
  if (flight->busy == 0) out.add(*flight);
}

void TcpConnection::room_locked(Deliveries& out) {
  if (want_room_ && flights_.size() + zombies_.size() < kMaxInFlight) {
    want_room_ = false;
    out.writable = true;
  }
}

void TcpConnection::deliver(Deliveries& deliveries) noexcept {
  for (auto& end : deliveries.ends) {
    if (end.ending == Flight::Ending::kEnd)
      host_.ended(*this, end.request, std::move(end.completion));
    else if (end.ending == Flight::Ending::kQuiesce)
      host_.quiesced(*end.request);
  }
  for (auto& request : deliveries.unshown) host_.unshown(*this, *request);
  if (deliveries.writable) host_.writable(*this);
}

// ---------------------------------------------------------------- cutting frames, under mutex_

void TcpConnection::queue_locked(uint32_t lane, Bytes bytes) {
  Frame frame;
  frame.head = std::move(bytes);
  lanes_[lane]->queue.push_back(std::move(frame));
}

void TcpConnection::enqueue(Bytes frame) {
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    queue_locked(0, std::move(frame));
  }
  pump_soon(*lanes_[0]);
}

bool TcpConnection::next_frame(Lane& lane) {
  if (!lane.queue.empty()) {
    lane.current = std::move(lane.queue.front());
    lane.queue.pop_front();
    return true;
  }
  auto& jobs = lane.index == 0 ? small_jobs_ : bulk_jobs_;
  // The peer's reads and our writes take turns, so that neither starves the other.
  if (lane.index != 0 && !serves_.empty() &&
      (jobs.empty() || (lane.serve_turn = !lane.serve_turn))) {
    Serve serve = std::move(serves_.front());
    serves_.pop_front();
    return cut_serve(lane, serve);
  }
  while (!jobs.empty()) {
    FlightPtr flight = std::move(jobs.front());
    jobs.pop_front();
    if (!flights_.contains(flight->request->id)) continue;  // ended while it waited
    const bool cut = cut_write(lane, flight);
    if (!flight->cut_all) jobs.push_back(flight);  // round robin, one stripe each
    if (cut) return true;
  }
  return false;
}

bool TcpConnection::cut_write(Lane& lane, const FlightPtr& flight) {
  const Request& request = *flight->request;
  StripeHead stripe;
  stripe.access = {request.op, request.remote, request.lease};
  stripe.total_nbytes = request.nbytes;
  stripe.first_target = flight->span;
  stripe.has_arrival = request.has_arrival;
  stripe.arrival = request.arrival;
  stripe.has_notify = request.has_notify && !flight->begun;  // once, in the first stripe
  Frame& frame = lane.current.emplace();
  uint64_t left = kStripeBytes;
  while (flight->span < request.spans.size() && left > 0 && stripe.targets.size() < kMaxPieces &&
         frame.body.pieces.size() < kMaxPieces) {
    const Span& span = request.spans[flight->span];
    uint64_t n = std::min<uint64_t>(left, span.nbytes - flight->span_done);
    const size_t room = kMaxPieces - frame.body.pieces.size();
    size_t used = 0;
    uint64_t taken = 0;  // a span over many small pieces of a region may be cut between two
    request.local->resolve(span.local + flight->span_done, n, [&](std::byte* base, size_t nbytes) {
      if (used++ < room) frame.body.add(base, nbytes), taken += nbytes;
    });
    stripe.targets.push_back({span.remote + flight->span_done, static_cast<uint32_t>(taken)});
    left -= taken;
    flight->span_done += taken;
    if (flight->span_done == span.nbytes) flight->span_done = 0, ++flight->span;
  }
  flight->cut_all = flight->span == request.spans.size();
  frame.body_nbytes = frame.body.left;
  frame.head = encode_stripe({.type = Type::kStripe,
                              .body_nbytes = static_cast<uint32_t>(frame.body_nbytes),
                              .request = request.id,
                              .cancel_count = cancel_count_},
                             stripe, stripe.has_notify ? ByteView(request.notify) : ByteView());
  frame.has_trailer = true;
  write_trailer(Code::kOk, frame.trailer.data());
  frame.flight = flight;
  flight->begun = true;
  return true;
}

void TcpConnection::cut_reads() {
  while (!read_jobs_.empty() && reads_outstanding_ < kReadWindow) {
    FlightPtr flight = std::move(read_jobs_.front());
    read_jobs_.pop_front();
    const Request& request = *flight->request;
    if (!flights_.contains(request.id)) continue;
    StripeHead stripe;
    stripe.access = {Op::kRead, request.remote, request.lease};
    stripe.total_nbytes = request.nbytes;
    stripe.first_target = flight->span;
    stripe.stripe = flight->next_stripe++;
    Flight::ReadStripe record{flight->span, flight->span_done, 0};
    while (flight->span < request.spans.size() && record.nbytes < kStripeBytes &&
           stripe.targets.size() < kMaxPieces) {
      const Span& span = request.spans[flight->span];
      const uint64_t n =
          std::min<uint64_t>(kStripeBytes - record.nbytes, span.nbytes - flight->span_done);
      stripe.targets.push_back({span.remote + flight->span_done, static_cast<uint32_t>(n)});
      record.nbytes += n;
      flight->span_done += n;
      if (flight->span_done == span.nbytes) flight->span_done = 0, ++flight->span;
    }
    flight->reads.emplace(stripe.stripe, record);
    flight->begun = true;
    ++reads_outstanding_;
    Frame frame;
    frame.head = encode_stripe(
        {.type = Type::kRead, .request = request.id, .cancel_count = cancel_count_}, stripe, {});
    frame.flight = flight;
    lanes_[0]->queue.push_back(std::move(frame));
    flight->cut_all = flight->span == request.spans.size();
    if (!flight->cut_all) read_jobs_.push_back(flight);
  }
}

bool TcpConnection::cut_serve(Lane& lane, Serve& serve) {
  Frame& frame = lane.current.emplace();
  if (!serve.dropped) {
    for (const Target& t : serve.targets)
      serve.landing.region->resolve(t.offset, t.nbytes, [&](std::byte* base, size_t nbytes) {
        frame.body.add(base, nbytes);
      });
  }
  frame.body_nbytes = frame.body.left;
  frame.head =
      encode_read_data(serve.request, serve.stripe, static_cast<uint32_t>(frame.body_nbytes));
  frame.has_trailer = true;
  frame.served = frame.body_nbytes;
  write_trailer(serve.dropped ? Code::kCancelled : Code::kOk, frame.trailer.data());
  if (!serve.dropped) frame.landing = std::move(serve.landing);
  --serves_pending_;
  return true;
}

// ---------------------------------------------------------------- sending

void TcpConnection::pump_soon(Lane& lane) {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().defer([self, &lane] { self->pump(lane, kTurn); });
}

void TcpConnection::pump(Lane& lane, size_t budget) noexcept {
  Deliveries deliveries;
  std::optional<Failure> broken;
  bool more = false;
  {
    std::unique_lock lock(mutex_);
    if (lane.sending) {  // its holder looks again before it gives the token back
      lane.again = true;
      return;
    }
    lane.sending = true;
    while (!dead_) {
      lane.again = false;
      if (!lane.current && !next_frame(lane)) break;
      if (budget == 0) {
        more = true;
        break;
      }
      Frame& frame = *lane.current;
      const FlightPtr flight = frame.flight;
      const bool first = frame.sent == 0 && flight && flight->ending == Flight::Ending::kNone;
      const bool guarded = frame.landing.region != nullptr && frame.poison == Code::kOk;
      Landing landing = guarded ? frame.landing : Landing{};
      if (guarded && !landing.enter()) {
        frame.spoil(Code::kLease);
        continue;
      }
      frame.prepare();
      iovec iov[kMaxIov];
      msghdr message{};
      message.msg_iov = iov;
      message.msg_iovlen = frame.gather(iov);
      if (flight) ++flight->busy;
      lock.unlock();
      if (first) host_.posted(*flight->request);
      const ssize_t n = ::sendmsg(lane.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      const int err = errno;
      if (guarded) landing.leave();
      lock.lock();
      if (flight && --flight->busy == 0 && flight->ending != Flight::Ending::kNone)
        deliveries.add(*flight);
      if (n < 0) {
        if (err == EINTR) continue;
        if (err == EAGAIN) {
          if (lane.again) continue;  // room may have come since
          break;
        }
        broken = Failure{.code = Code::kPeerDisconnected,
                         .err = err,
                         .text = cat("the connection broke while sending: ", errno_text(err))};
        break;
      }
      frame.advance(static_cast<uint64_t>(n));
      budget -= std::min(budget, static_cast<size_t>(n));
      if (frame.sent == frame.size()) {
        if (frame.poison == Code::kOk)
          counters.bytes_served.fetch_add(frame.served, std::memory_order_relaxed);
        lane.current.reset();
      }
    }
    lane.sending = false;
    if (dead_) lane.current.reset();
  }
  deliver(deliveries);
  if (broken) close(*broken);
  if (more) pump_soon(lane);
}

// Only a note: the holder of the sending token may be inside a system call on these very bytes.
void TcpConnection::Frame::spoil(Code why) noexcept {
  if (has_trailer) poison = why;
}

void TcpConnection::Frame::prepare() noexcept {
  // Once a byte of an honest trailer is out, all of the body is too: the stripe counts.
  if (poison != Code::kOk && sent <= head.size() + body_nbytes)
    write_trailer(poison, trailer.data());
}

size_t TcpConnection::Frame::gather(iovec* out) const noexcept {
  size_t count = 0;
  uint64_t at = sent;
  if (at < head.size()) {
    out[count++] = {const_cast<std::byte*>(head.data()) + at,
                    static_cast<size_t>(head.size() - at)};
    at = head.size();
  }
  const uint64_t body_end = head.size() + body_nbytes;
  if (at < body_end) {
    if (poison == Code::kOk) {
      count += body.gather(out + count, kMaxIov - 2, ~uint64_t{0});
      if (body.pieces.size() - body.next > kMaxIov - 2) return count;  // the trailer comes later
    } else {
      while (at < body_end && count < kMaxIov - 2) {
        const size_t n = static_cast<size_t>(std::min<uint64_t>(sizeof padding, body_end - at));
        out[count++] = {padding, n};
        at += n;
      }
      if (at < body_end) return count;
    }
    at = body_end;
  }
  if (has_trailer) {
    const size_t skip = static_cast<size_t>(at - body_end);
    out[count++] = {const_cast<std::byte*>(trailer.data()) + skip, kTrailerBytes - skip};
  }
  return count;
}

void TcpConnection::Frame::advance(uint64_t nbytes) noexcept {
  const uint64_t before = std::clamp<uint64_t>(sent, head.size(), head.size() + body_nbytes);
  sent += nbytes;
  const uint64_t after = std::clamp<uint64_t>(sent, head.size(), head.size() + body_nbytes);
  body.advance(after - before);
}

void TcpConnection::Piecewise::advance(uint64_t nbytes) noexcept {
  left -= nbytes;
  while (nbytes > 0) {
    const uint64_t here = std::min<uint64_t>(nbytes, pieces[next].iov_len - offset);
    nbytes -= here;
    offset += static_cast<size_t>(here);
    if (offset == pieces[next].iov_len) offset = 0, ++next;
  }
}

size_t TcpConnection::Piecewise::gather(iovec* out, size_t max,
                                        uint64_t max_nbytes) const noexcept {
  size_t count = 0, skip = offset;
  for (size_t i = next; i < pieces.size() && count < max && max_nbytes > 0; ++i) {
    const size_t n = static_cast<size_t>(std::min<uint64_t>(pieces[i].iov_len - skip, max_nbytes));
    out[count++] = {static_cast<std::byte*>(pieces[i].iov_base) + skip, n};
    max_nbytes -= n;
    skip = 0;
  }
  return count;
}

}  // namespace kvxfer::tcp
