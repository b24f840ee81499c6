// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The sending half of a tcp connection: requests are cut into frames, several frames go down in one
// system call, straight from the regions' memory.
#include <algorithm>
#include <cerrno>

#include "transport/tcp/deliveries.hpp"

namespace kvxfer::tcp {
namespace {
constexpr size_t kMaxFrames = 64;  // in one system call
constexpr size_t kSpareFrames = 64;
}  // namespace

// ---------------------------------------------------------------- frames, under mutex_

FramePtr TcpConnection::new_frame() {
  if (spare_frames_.empty()) return std::make_unique<Frame>();
  FramePtr frame = std::move(spare_frames_.back());
  spare_frames_.pop_back();
  return frame;
}

FramePtr TcpConnection::new_frame(Bytes head) {
  FramePtr frame = new_frame();
  frame->head = std::move(head);
  return frame;
}

void TcpConnection::recycle(FramePtr frame) {
  if (spare_frames_.size() >= kSpareFrames) return;
  frame->reset();
  spare_frames_.push_back(std::move(frame));
}

void TcpConnection::queue_locked(uint32_t lane, Bytes bytes) {
  lanes_[lane]->queue.push_back(new_frame(std::move(bytes)));
}

void TcpConnection::enqueue(Bytes frame) {
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    queue_locked(0, std::move(frame));
  }
  pump_soon(*lanes_[0]);
}

// What the peer makes us say is bounded (receive()), so that one that asks and does not listen
// costs no more memory than one that does.
void TcpConnection::answer_locked(FramePtr frame) {
  frame->answer_nbytes = sizeof(Frame) + frame->head.size();
  answers_nbytes_ += frame->answer_nbytes;
  lanes_[0]->queue.push_back(std::move(frame));
}

void TcpConnection::answer(Bytes frame) {
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    answer_locked(new_frame(std::move(frame)));
  }
  pump_soon(*lanes_[0]);
}

void TcpConnection::send_control_now(ByteView payload) {
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    queue_locked(0, encode_plain(Type::kControl, payload));
  }
  pump(*lanes_[0], kTurn);
}

// One system call's worth; what waits longer is chosen later, so a new small request or an ABORT is
// at most that far behind.
void TcpConnection::fill_out(Lane& lane) {
  while (lane.out_nbytes < kStripeBytes && lane.out.size() < kMaxFrames) {
    FramePtr frame = next_frame(lane);
    if (!frame) return;
    lane.out_nbytes += frame->size();
    lane.out.push_back(std::move(frame));
  }
}

FramePtr TcpConnection::next_frame(Lane& lane) {
  if (!lane.queue.empty()) {
    FramePtr frame = std::move(lane.queue.front());
    lane.queue.pop_front();
    answers_nbytes_ -= frame->answer_nbytes;
    return frame;
  }
  auto& jobs = lane.index == 0 ? small_jobs_ : bulk_jobs_;
  // The peer's reads and our writes take turns, so that neither starves the other.
  if (lane.index != 0 && !serves_.empty() &&
      (jobs.empty() || (lane.serve_turn = !lane.serve_turn))) {
    Serve serve = std::move(serves_.front());
    serves_.pop_front();
    return cut_serve(serve);
  }
  while (!jobs.empty()) {
    FlightPtr flight = std::move(jobs.front());
    jobs.pop_front();
    if (!flights_.contains(flight->request->id)) continue;  // ended while it waited
    FramePtr frame = cut_write(flight);
    if (!flight->cut_all) jobs.push_back(flight);  // round robin, one stripe each
    return frame;
  }
  return {};
}

Access access_of(const Request& request) {
  return {request.op, request.remote, request.lease,
          request.has_arrival ? std::optional(request.arrival) : std::nullopt};
}

FramePtr TcpConnection::cut_write(const FlightPtr& flight) {
  const Request& request = *flight->request;
  FramePtr frame = new_frame();
  StripeHead& stripe = cutting_;
  stripe.targets.clear();
  stripe.access = access_of(request);
  stripe.total_nbytes = request.nbytes;
  stripe.first_target = flight->span;
  stripe.stripe = 0;
  stripe.has_notify = request.has_notify && !flight->begun;  // once, in the first stripe
  uint64_t left = kStripeBytes;
  while (flight->span < request.spans.size() && left > 0 && stripe.targets.size() < kMaxPieces) {
    const Span& span = request.spans[flight->span];
    const uint64_t n = std::min<uint64_t>(left, span.nbytes - flight->span_done);
    request.local->resolve(span.local + flight->span_done, n,
                           [&](std::byte* base, size_t nbytes) { frame->body.add(base, nbytes); });
    stripe.targets.push_back({span.remote + flight->span_done, static_cast<uint32_t>(n)});
    left -= n;
    flight->span_done += n;
    if (flight->span_done == span.nbytes) flight->span_done = 0, ++flight->span;
  }
  flight->cut_all = flight->span == request.spans.size();
  frame->body_nbytes = frame->body.left;
  encode_stripe({.type = Type::kStripe,
                 .body_nbytes = static_cast<uint32_t>(frame->body_nbytes),
                 .request = request.id,
                 .cancel_count = cancel_count_},
                stripe, stripe.has_notify ? ByteView(request.notify) : ByteView(), frame->head);
  frame->set_trailer(Code::kOk);
  frame->flight = flight;
  ++flight->unsent;
  flight->begun = true;
  return frame;
}

void TcpConnection::cut_reads() {
  while (!read_jobs_.empty() && reads_outstanding_ < kReadWindow) {
    FlightPtr flight = std::move(read_jobs_.front());
    read_jobs_.pop_front();
    const Request& request = *flight->request;
    if (!flights_.contains(request.id)) continue;
    StripeHead& stripe = cutting_;
    stripe.targets.clear();
    stripe.access = access_of(request);
    stripe.total_nbytes = request.nbytes;
    stripe.first_target = flight->span;
    stripe.has_notify = false;
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
    FramePtr frame = new_frame();
    encode_stripe({.type = Type::kRead, .request = request.id, .cancel_count = cancel_count_},
                  stripe, {}, frame->head);
    frame->flight = flight;
    ++flight->unsent;
    lanes_[0]->queue.push_back(std::move(frame));
    flight->cut_all = flight->span == request.spans.size();
    if (!flight->cut_all) read_jobs_.push_back(flight);
  }
}

FramePtr TcpConnection::cut_serve(Serve& serve) {
  FramePtr frame = new_frame();
  if (!serve.dropped) {
    for (const Target& t : serve.targets)
      serve.landing.region->resolve(t.offset, t.nbytes, [&](std::byte* base, size_t nbytes) {
        frame->body.add(base, nbytes);
      });
    frame->landing = std::move(serve.landing);
  }
  frame->body_nbytes = frame->body.left;
  frame->head =
      encode_read_data(serve.request, serve.stripe, static_cast<uint32_t>(frame->body_nbytes));
  frame->set_trailer(serve.dropped ? Code::kCancelled : Code::kOk);
  --serves_pending_;
  return frame;
}

// ---------------------------------------------------------------- sending

void TcpConnection::pump_soon(Lane& lane) {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().defer([self, &lane] { self->pump(lane, kTurn); });
}

void TcpConnection::pump_all_soon() {
  auto self = std::static_pointer_cast<TcpConnection>(shared_from_this());
  host_.reactor().defer([self] {
    for (auto& lane : self->lanes_) self->pump(*lane, kTurn);
  });
}

// Under mutex_: gathers what goes down in one system call, inside the gates of what it reads.
size_t TcpConnection::enter_out(Lane& lane, iovec* iov, std::span<Frame*> frames,
                                size_t& num_frames) {
  size_t count = 0;
  num_frames = 0;
  for (auto& frame : lane.out) {
    if (count == kMaxIov || num_frames == frames.size()) break;
    frame->inside = false;
    if (frame->landing.region != nullptr && frame->poison == Code::kOk) {
      frame->inside = frame->landing.enter();
      if (!frame->inside) frame->spoil(frame->landing.closed().code);
    }
    if (frame->flight) ++frame->flight->busy;
    frames[num_frames++] = frame.get();
    if (!frame->gather(iov + count, kMaxIov - count, count)) break;
  }
  return count;
}

// Under mutex_, after it; the gates were left already.
void TcpConnection::leave_out(Lane& lane, std::span<Frame* const> frames, uint64_t nbytes,
                              Deliveries& out) {
  for (Frame* frame : frames)
    if (auto& flight = frame->flight; flight && --flight->busy == 0) out.add(*flight);
  lane.out_nbytes -= nbytes;
  while (nbytes > 0) {
    Frame& frame = *lane.out.front();
    const uint64_t here = std::min(nbytes, frame.size() - frame.sent);
    frame.advance(here);
    nbytes -= here;
    if (frame.sent < frame.size()) break;
    if (frame.flight) --frame.flight->unsent;
    if (frame.landing.region && frame.poison == Code::kOk)
      counters.bytes_served.fetch_add(frame.body_nbytes, std::memory_order_relaxed);
    FramePtr done = std::move(lane.out.front());
    lane.out.pop_front();
    recycle(std::move(done));
  }
}

void TcpConnection::pump(Lane& lane, size_t budget) noexcept {
  if (!lane.stream->shared() && !host_.reactor().on_thread()) return pump_soon(lane);
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
      fill_out(lane);
      if (budget == 0 && !lane.out.empty()) {
        more = true;
        break;
      }
      iovec iov[kMaxIov];
      Frame* frames[kMaxFrames];
      size_t num_frames = 0;
      const size_t count = enter_out(lane, iov, frames, num_frames);
      lock.unlock();
      const std::span used(frames, num_frames);
      for (Frame* frame : used)
        if (frame->flight && !std::exchange(frame->told, true))
          host_.posted(*frame->flight->request);
      const ssize_t n = count > 0 ? lane.stream->send({iov, count}) : lane.stream->flush() ? 0 : -1;
      const int err = errno;
      for (Frame* frame : used)
        if (frame->inside) frame->landing.leave();
      lock.lock();
      leave_out(lane, used, n > 0 ? static_cast<uint64_t>(n) : 0, deliveries);
      if (n < 0) {
        if (err == EINTR) continue;
        if (err == EAGAIN) {
          if (lane.again) continue;  // room may have come since
          break;
        }
        broken =
            Failure{.code = Code::kPeerDisconnected,
                    .err = err,
                    .text = cat("the connection broke while sending: ", lane.stream->explain(err))};
        break;
      }
      if (count == 0 && !lane.again) break;
      budget -= std::min(budget, static_cast<size_t>(n));
    }
    lane.sending = false;
    if (dead_) lane.out.clear();
  }
  deliver(deliveries);
  if (broken) close(*broken);
  if (more) pump_soon(lane);
}

}  // namespace kvxfer::tcp
