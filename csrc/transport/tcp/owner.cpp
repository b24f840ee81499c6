// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's half of a tcp connection: the peer's writes, reads and cancels, judged before a byte
// lands. Progress thread only.
#include <algorithm>

#include "transport/tcp/deliveries.hpp"

namespace kvxfer::tcp {

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
  } else if (inbound.total == 0) {  // the first may be in the middle, and would be accepted twice
    return protocol_error("a second stripe of an empty request");
  }
  if (stripe.has_notify) {
    if (inbound.arrival.has_notify) return protocol_error("two notifications in one request");
    inbound.arrival.has_notify = true;
    if (!inbound.verdict && !inbound.aborted) {
      // An honest peer has a credit for each, and there are kNotifyWindow.
      if (notifies_held_ >= 2 * kNotifyWindow)
        return protocol_error("more notifications of unfinished requests than the window allows");
      ++notifies_held_;
      inbound.holds_notify = true;
      inbound.arrival.notify.assign(stripe.notify.begin(), stripe.notify.end());
    }
  }
  inbound.arrival.has_arrival = stripe.access.arrival.has_value();
  inbound.arrival.arrival = stripe.access.arrival.value_or(0);
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
  lane.phase = Lane::Phase::kBody;
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
  notifies_held_ -= std::exchange(inbound->holds_notify, false);
  if (auto failure = host_.accept(*this, inbound->landing, std::move(inbound->arrival))) {
    refuse(lane.head.request, *inbound, *failure);
    return Step::kAgain;
  }
  counters.requests_served.fetch_add(1, std::memory_order_relaxed);
  inbound_.erase(lane.head.request);
  acks_.push_back(lane.head.request);
  acks_wait_ = acks_wait_ && inbound->op == Op::kNotify;
  if (acks_.size() >= 1024) flush_acks();
  return Step::kAgain;
}

// Told at once; the record stays until the initiator's ABORT, and its bytes go to the sink.
void TcpConnection::refuse(uint64_t request, Inbound& inbound, const Failure& failure) {
  inbound.verdict = true;
  drop_notify(inbound);
  if (failure.code != Code::kCancelled) counters.refused.fetch_add(1, std::memory_order_relaxed);
  answer(encode_failure(Type::kRefuse, request, failure));
}

void TcpConnection::drop_notify(Inbound& inbound) {
  notifies_held_ -= std::exchange(inbound.holds_notify, false);
  inbound.arrival.notify = {};
}

void TcpConnection::flush_acks() {
  if (acks_.empty()) return;
  {
    std::lock_guard lock(mutex_);
    if (dead_) return;
    answer_locked(new_frame(encode_acks(acks_)));
  }
  acks_.clear();
  if (std::exchange(acks_wait_, true)) {
    // Nobody's memory waits for the end of a notification, and the application may be about to
    // answer it: one segment then takes both. At once if it polls, else if it gets this CPU.
    Reactor& reactor = host_.reactor();
    if (reactor.lent()) return pump_soon(*lanes_[0]);
    reactor.step_aside();
  }
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
  drop_notify(*inbound);
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
    receive_soon(*other);
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
      answer_locked(new_frame(encode_failure(Type::kRefuse, serve.request, *failure)));
      FramePtr frame = new_frame(encode_read_data(serve.request, serve.stripe, 0));
      frame->set_trailer(failure->code);
      answer_locked(std::move(frame));
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
    pump_all_soon();
  }
  return Step::kAgain;
}

}  // namespace kvxfer::tcp
