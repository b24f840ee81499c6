// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The life of a tcp connection: post, cancel, close, and how requests end.
#include "transport/tcp/connection.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "transport/tcp/deliveries.hpp"
#include "transport/tcp/socket.hpp"

namespace kvxfer::tcp {
namespace {
// A caller of post() sends small requests itself and leaves bulk to the progress thread: copying a
// gigabyte into a socket is no work for the thread that computes the next layer.
constexpr size_t kCallerBudget = 64 * 1024;
constexpr int64_t kGoodbyeNs = 5'000'000;
}  // namespace

struct TcpConnection::LaneHandler final : FdHandler {
  LaneHandler(std::shared_ptr<TcpConnection> owner, Lane& l)
      : connection(std::move(owner)), lane(l) {}
  void on_events(uint32_t events) override {
    lane.hung_up |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    if (events & EPOLLOUT) connection->pump(lane, kTurn);
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) connection->receive(lane);
  }
  std::shared_ptr<TcpConnection> connection;  // the reactor's reference, dropped by remove()
  Lane& lane;
};

TcpConnection::TcpConnection(SessionHost& host, Session session, std::vector<StreamPtr> lanes)
    : Connection("tcp"), host_(host), session_(std::move(session)) {
  for (StreamPtr& stream : lanes) {
    auto lane = std::make_unique<Lane>();
    lane->index = static_cast<uint32_t>(lanes_.size());
    lane->stream = std::move(stream);
    lane->buffer.resize(16 * 1024);
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
  heard_ns_ = now_ns();
  for (auto& lane : lanes_) {
    lane->token = host_.reactor().add(lane->stream->fd(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                      std::make_shared<LaneHandler>(self, *lane));
    // What the handshake's last read brought along is in the stream, and no event tells of it.
    if (!lane->stream->shared()) receive_soon(*lane);
  }
}

bool TcpConnection::same_host() const noexcept { return tcp::same_host(lanes_[0]->stream->fd()); }

std::string TcpConnection::describe() const {
  return cat("tcp: ", peer_address(lanes_[0]->stream->fd()), ", 1 control lane + ",
             lanes_.size() - 1, " bulk lane(s), ", lanes_[0]->stream->describe());
}

// ---------------------------------------------------------------- post, cancel, close

Status TcpConnection::post(const RequestPtr& request) noexcept {
  bool small, watch;
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
    watch = !std::exchange(watched_, true);
  }
  if (watch) watch_peer();
  counters.requests.fetch_add(1, std::memory_order_relaxed);
  if (small) {
    pump(*lanes_[0], kCallerBudget);
  } else {
    pump_all_soon();
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
  if (begun) pump_all_soon();
  return result;
}

// The owner must forget the request, and nothing that we post later may be overtaken by its rest:
// ABORT goes down every lane, behind the frame that each is in the middle of.
void TcpConnection::abort_locked(const FlightPtr& flight) {
  spoil_locked(flight);
  ++cancel_count_;
  for (auto& lane : lanes_)
    queue_locked(lane->index, encode_abort(flight->request->id, cancel_count_));
}

void TcpConnection::spoil_locked(const FlightPtr& flight) {
  for (auto& lane : lanes_)
    for (auto& frame : lane->out)
      if (frame->flight == flight) frame->spoil(Code::kCancelled);
}

void TcpConnection::close(const Failure& cause) noexcept {
  if (cause.code == Code::kCancelled && !lanes_[0]->stream->shared() &&
      !host_.reactor().on_thread()) {
    auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
    host_.reactor().post([self, cause] { self->close(cause); });  // it alone may say goodbye
    return;
  }
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
    for (auto& lane : lanes_) ::shutdown(lane->stream->fd(), SHUT_RDWR);
  }
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().post([self] { self->buried(); });
}

// On the progress thread, once, after dead_ was set: no callback of a lane is running.
void TcpConnection::buried() noexcept {
  for (auto& lane : lanes_)
    if (lane->token != 0) host_.reactor().remove(lane->token, lane->stream->fd());
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
      if (!lane->sending) lane->out.clear();
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

}  // namespace kvxfer::tcp
