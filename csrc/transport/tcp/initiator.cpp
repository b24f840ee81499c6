// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The initiator's half of a tcp connection: what the peer says to our requests. Progress thread
// only.
#include <algorithm>

#include "transport/tcp/deliveries.hpp"

namespace kvxfer::tcp {

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
  lane.phase = Lane::Phase::kBody;
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
  if (aborted) pump_all_soon();
  return Step::kAgain;
}

// ---------------------------------------------------------------- verdicts on our requests

TcpConnection::Step TcpConnection::on_acks(ByteView control) {
  if (control.size() % sizeof(uint64_t) != 0) return protocol_error("malformed ACK");
  Deliveries deliveries;
  bool early = false;
  {
    std::lock_guard lock(mutex_);
    for (Reader r(control); r.remaining() > 0 && !early;) {
      const uint64_t id = r.u64();
      if (zombies_.erase(id) != 0) continue;  // it had landed after all: the target's counts say so
      auto it = flights_.find(id);
      if (it == flights_.end()) continue;
      FlightPtr flight = it->second;
      // The thread that has sent the last of it may not have come back yet to say so: it is busy.
      early = !flight->cut_all || flight->request->op == Op::kRead ||
              (flight->unsent > 0 && flight->busy == 0);
      if (early) break;
      if (flight->unsent > 0) spoil_locked(flight);  // if it has not: its memory is not read again
      counters.bytes_written.fetch_add(flight->request->nbytes, std::memory_order_relaxed);
      finish(flight, Flight::Ending::kEnd,
             {.ok = true, .nbytes = flight->request->nbytes, .failure = {}}, deliveries);
    }
    room_locked(deliveries);
  }
  deliver(deliveries);
  return early ? protocol_error("ACK of a request that was not sent") : Step::kAgain;
}

TcpConnection::Step TcpConnection::on_refuse(Lane& lane, ByteView control) {
  auto failure = decode_failure(control);
  if (!failure) return protocol_error("malformed REFUSE");
  Deliveries deliveries;
  bool aborted = false;
  {
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
  if (aborted) pump_all_soon();
  return Step::kAgain;
}

}  // namespace kvxfer::tcp
