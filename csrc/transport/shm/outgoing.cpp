// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/outgoing.hpp"

#include <algorithm>
#include <cstring>

namespace kvxfer::shm {

Outgoing::Outgoing(Channel& channel, Connection& connection, Host& host, Show show, void* context)
    : channel_(channel),
      connection_(connection),
      host_(host),
      show_(show),
      context_(context),
      flights_(kNumSlots) {}

std::span<const Span> Outgoing::spans_from(const Request& request, size_t first) {
  const std::span<const Span> all(request.spans);
  return all.subspan(first, std::min<size_t>(all.size() - first, kMaxSpansPerRecord));
}

Status Outgoing::post(const RequestPtr& request, bool& needs_pump) noexcept {
  RequestHead head;
  head.op = static_cast<uint32_t>(request->op);
  head.notify_nbytes = static_cast<uint32_t>(request->notify.size());
  head.nbytes = request->nbytes;
  head.region = request->remote;
  head.lease = request->lease;
  head.arrival = request->arrival;
  if (request->has_notify) head.flags |= kHasNotify;
  if (request->has_arrival) head.flags |= kHasArrival;

  const bool mapped =
      request->op == Op::kWrite && request->nbytes > 0 && show_(context_, *request->local);
  if (mapped) {
    head.flags |= kMapped;
    head.source = request->local->id;
  }
  if (request->op == Op::kRead) head.flags |= kMapped;  // where the owner can let us pull
  // A read starts with its first spans and asks for the rest as it goes. Those of a write go with
  // its head or, when they are many, first to be judged and then once more to be copied.
  std::span<const Span> spans = spans_from(*request, 0);
  const bool inlined = spans.size() == request->spans.size();
  if (inlined)
    head.flags |= kInline;
  else if (request->op == Op::kWrite)
    spans = {};
  head.num_spans = static_cast<uint32_t>(spans.size());
  needs_pump = request->op == Op::kWrite && request->nbytes > 0 && !(mapped && inlined);

  std::unique_lock lock(mutex_);
  if (dead_) return {Code::kPeerDisconnected};
  if (flights_.full()) {
    room_wanted_.store(true, std::memory_order_relaxed);
    return {Code::kAgain};
  }
  const uint32_t slot = flights_.next();
  Flight& flight = flights_[slot];
  head.ticket = {slot, ++flight.generation};
  // Before the record: the owner's CAS must find it.
  channel_.my_slot(slot).store(slot_word(flight.generation, Slot::kPosted),
                               std::memory_order_release);
  const auto try_message = [&] {
    return channel_.try_message(Type::kRequest, {view_of(head), request->notify, view_of(spans)});
  };
  Channel::Sent sent = try_message();
  if (sent == Channel::Sent::kNoRoom) {
    // Before the attempt that asks the consumer for a bell: who hears it looks at this.
    room_wanted_.store(true, std::memory_order_relaxed);
    sent = try_message();
    if (sent == Channel::Sent::kNoRoom) return {Code::kAgain};
  }
  flights_.occupy(request);
  flight.mapped = mapped;
  flight.judged = flight.window_end = spans.size();
  flight.asked_spans = spans.size();
  for (const Span& span : spans) flight.asked += span.nbytes;
  if (needs_pump) {
    pumping_.push_back(head.ticket);
    any_pumping_.store(true, std::memory_order_relaxed);
  }
  lock.unlock();
  if (sent == Channel::Sent::kMustRing) channel_.ring();
  return {};
}

bool Outgoing::take_back(uint32_t slot) noexcept {
  const uint32_t generation = flights_[slot].generation;
  uint64_t word = slot_word(generation, Slot::kPosted);
  channel_.my_slot(slot).compare_exchange_strong(word, slot_word(generation, Slot::kCancelled),
                                                 std::memory_order_acq_rel);
  return word != slot_word(generation, Slot::kAccepted);
}

Cancelled Outgoing::cancel(const RequestPtr& request) noexcept {
  std::lock_guard lock(mutex_);
  const auto slot = flights_.slot_of(*request);
  if (!slot) return {Agreement::kEnding, true};
  Flight& flight = flights_[*slot];
  Agreement agreement = Agreement::kStopped;
  if (!take_back(*slot))
    // An accepted read has been sent, but its last bytes may not have been stored here.
    agreement = request->op == Op::kRead ? Agreement::kUnknown : Agreement::kAlreadyAccepted;
  flight.cancelled = true;
  channel_.message(Type::kAbort, {view_of(PartHead{{*slot, flight.generation}, 0})});
  return {agreement, !flight.inside};
}

bool Outgoing::room_wanted() noexcept {
  if (!room_wanted_.load(std::memory_order_relaxed)) return false;
  std::lock_guard lock(mutex_);
  return !flights_.full() && room_wanted_.exchange(false, std::memory_order_relaxed);
}

RequestPtr Outgoing::give_up(Ticket ticket, const Flight& flight) noexcept {
  RequestPtr request;
  if (!flight.cancelled) request = flight.request;
  flights_.release(ticket.slot);
  return request;
}

void Outgoing::end(Ticket ticket, Completion completion) {
  RequestPtr request;
  {
    std::lock_guard lock(mutex_);
    if (const Flight* flight = flights_.find(ticket)) request = give_up(ticket, *flight);
  }
  if (request) tell(request, std::move(completion));
}

void Outgoing::tell(const RequestPtr& request, Completion completion) {
  if (completion.ok) connection_.counters.carried(request->op, request->nbytes);
  host_.ended(connection_, request, std::move(completion));
}

bool Outgoing::on_outcome(const OutcomeHead& outcome, std::string_view text) {
  Completion completion;
  RequestPtr request;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(outcome.ticket);
    if (flight == nullptr) return outcome.ticket.slot < kNumSlots;
    const Request& asked = *flight->request;
    completion = completion_of(outcome, asked.nbytes, text);
    if (completion.ok && asked.op == Op::kRead && flight->landed < asked.nbytes &&
        !flight->cancelled) {
      flight->accepted = true;  // the rest is in the bulk ring
      return true;
    }
    request = give_up(outcome.ticket, *flight);
  }
  if (request) tell(request, std::move(completion));
  return true;
}

RequestPtr Outgoing::enter(Ticket ticket) noexcept {
  std::lock_guard lock(mutex_);
  Flight* flight = flights_.find(ticket);
  if (flight == nullptr || flight->cancelled) return nullptr;
  flight->inside = true;
  return flight->request;
}

void Outgoing::leave(Ticket ticket, Request& request) noexcept {
  bool report;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(ticket);
    flight->inside = false;
    report = flight->cancelled;  // cancel() came meanwhile and said "not quiesced"
  }
  if (report) host_.quiesced(request);
}

// The next record of spans, from `sent` on.
bool Outgoing::pump_spans(Type type, Ticket ticket, const Request& request, size_t& sent) {
  const std::span<const Span> spans = spans_from(request, sent);
  if (!channel_.bulk(type, {view_of(PartHead{ticket, spans.size()}), view_of(spans)})) return false;
  sent += spans.size();
  return true;
}

bool Outgoing::pump_staged(Ticket ticket, const Request& request, Flight& flight) {
  std::byte* stage = channel_.stage();
  if (stage == nullptr) return false;
  pieces_.clear();
  size_t span = flight.span;
  uint64_t offset = flight.offset;
  uint32_t filled = 0;
  while (filled < kStageSlotBytes && span < flight.window_end) {
    const Span& from = request.spans[span];
    const uint64_t n = std::min<uint64_t>(from.nbytes - offset, kStageSlotBytes - filled);
    request.local->resolve(from.local + offset, n, [&](const std::byte* bytes, size_t size) {
      pieces_.push_back({stage + filled, bytes, size});
      filled += static_cast<uint32_t>(size);
    });
    offset += n;
    if (offset == from.nbytes) ++span, offset = 0;
  }
  for (size_t i = 0; i < pieces_.size(); ++i) {
    if (i + 1 < pieces_.size())
      prefetch_block(pieces_[i + 1].to, pieces_[i + 1].from, pieces_[i + 1].nbytes);
    std::memcpy(pieces_[i].to, pieces_[i].from, pieces_[i].nbytes);
  }
  if (!channel_.bulk(Type::kStaged, {view_of(StageHead{ticket, channel_.stage_slot(), filled})}))
    return false;
  channel_.stage_used();
  flight.span = span;
  flight.offset = offset;
  return true;
}

// One record or one staging slot.
bool Outgoing::pump_one(Ticket ticket, const Request& request, Flight& flight, bool& finished) {
  const size_t num_spans = request.spans.size();
  bool progressed = false;
  if (flight.judged < num_spans)
    progressed = pump_spans(Type::kCheck, ticket, request, flight.judged);
  else if (flight.window_end < num_spans && (flight.mapped || flight.span == flight.window_end))
    progressed = pump_spans(Type::kSpans, ticket, request, flight.window_end);
  else
    progressed = pump_staged(ticket, request, flight);
  finished = flight.judged == num_spans && flight.window_end == num_spans &&
             (flight.mapped || flight.span == num_spans);
  return progressed;
}

bool Outgoing::pump() {
  if (!any_pumping_.load(std::memory_order_relaxed)) return false;
  Ticket ticket;
  {
    std::lock_guard lock(mutex_);
    any_pumping_.store(!pumping_.empty(), std::memory_order_relaxed);
    if (pumping_.empty()) return false;
    ticket = pumping_.front();
    pumping_.pop_front();
  }
  const RequestPtr request = enter(ticket);
  if (!request) return true;  // ended or cancelled: forgotten
  Flight& flight = flights_[ticket.slot];
  bool finished = false;
  const bool progressed = pump_one(ticket, *request, flight, finished);
  if (!finished) {  // round robin; when there was no room, it keeps its turn
    std::lock_guard lock(mutex_);
    progressed ? pumping_.push_back(ticket) : pumping_.push_front(ticket);
  }
  leave(ticket, *request);
  return progressed;
}

void Outgoing::end_all(const Failure& cause) {
  std::vector<std::pair<RequestPtr, bool>> left;
  {
    std::lock_guard lock(mutex_);
    dead_ = true;
    for (uint32_t slot = 0; slot < kNumSlots; ++slot) {
      Flight& flight = flights_[slot];
      if (!flight.request) continue;
      // Taken back, since a peer that lives may still find it in its ring. If it accepted before,
      // the bytes are where they belong: done.
      const bool accepted = !take_back(slot);
      if (!flight.cancelled) left.emplace_back(flight.request, accepted);
      flights_.release(slot);
    }
    pumping_.clear();
    pulling_.clear();
  }
  for (auto& [request, accepted] : left) {
    Completion completion;
    // An accepted read was sent, but its last bytes have not been stored here.
    completion.ok = accepted && request->op != Op::kRead;
    completion.agreed = completion.ok || !accepted;
    completion.nbytes = completion.ok ? request->nbytes : 0;
    if (!completion.ok) completion.failure = cause;
    host_.ended(connection_, request, std::move(completion));
  }
}

}  // namespace kvxfer::shm
