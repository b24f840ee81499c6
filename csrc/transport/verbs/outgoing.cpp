// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Posting, cancelling and ending; writes.
#include "transport/verbs/outgoing.hpp"

#include <algorithm>
#include <utility>

#include "common/clock.hpp"

namespace kvxfer::verbs {

Outgoing::Outgoing(const Devices& devices, Channel& channel, Rails& rails, MemoryTable& memory,
                   Connection& connection, Host& host, bool push)
    : channel_(channel),
      rails_(rails),
      memory_(memory),
      connection_(connection),
      host_(host),
      words_(kNumSlots + kMaxRails),
      words_registration_(devices, words_.data(), words_.size() * sizeof(words_[0]),
                          IBV_ACCESS_LOCAL_WRITE, "words of reads"),
      flights_(kNumSlots),
      rows_(rails),
      push_(push) {}

// What the owner must know of the next bytes: for a pulled write, where they are as well.
void Outgoing::next_segments(const Request& request, Flight& flight, std::vector<Segment>& out) {
  out.clear();
  rows_.clear();
  const bool pulled = request.op == Op::kWrite && flight.memory && !flight.window;
  while (out.size() < kMaxSegments && !rows_.full() && flight.span < request.spans.size()) {
    const Span& span = request.spans[flight.span];
    Segment segment{0, span.remote + flight.offset, 0, 0};
    if (pulled) {
      const RegionMemory::Run run =
          flight.memory->at(span.local + flight.offset, span.nbytes - flight.offset);
      segment.address = reinterpret_cast<uint64_t>(run.base);
      segment.nbytes = run.nbytes;
      segment.row = rows_.row_of(*run.registration);
    } else {
      segment.nbytes = span.nbytes;
    }
    flight.offset += segment.nbytes;
    flight.announced += segment.nbytes;
    if (flight.offset == span.nbytes) ++flight.span, flight.offset = 0;
    out.push_back(segment);
  }
}

// Which of the caller's spans the owner means by a segment's number.
uint64_t Outgoing::span_of(const Request& request, const RegionMemory* memory,
                           uint64_t segment) const {
  if (request.op != Op::kWrite || memory == nullptr)
    return segment < request.spans.size() ? request.spans[segment].index : kNoSpan;
  uint64_t number = 0;
  for (const Span& span : request.spans)
    for (uint64_t offset = 0; offset < span.nbytes; ++number) {
      if (number == segment) return span.index;
      offset += memory->at(span.local + offset, span.nbytes - offset).nbytes;
    }
  return kNoSpan;
}

// How its bytes go: through this window, if it may be null and they fit in; or else as they can.
void Outgoing::route(const Request& request, Flight& flight, std::shared_ptr<PushWindow> window) {
  if (window && window->state == PushWindow::State::kOpen &&
      fits(request, *flight.memory, *window)) {
    flight.window = std::move(window);
    return;
  }
  flight.window = nullptr;
  if (flight.memory && request.op == Op::kWrite && !flight.memory->readable())
    flight.memory = nullptr;
  flight.staged = request.nbytes > 0 && !flight.memory;
}

// The request and its first segments. `may_wait`: where there is no room it is sent later.
Sent Outgoing::send_request(Ticket ticket, const Request& request, Flight& flight, bool may_wait) {
  RequestHead head;
  head.ticket = ticket;
  head.op = static_cast<uint32_t>(request.op);
  head.notify_nbytes = static_cast<uint32_t>(request.notify.size());
  head.nbytes = request.nbytes;
  head.region = request.remote;
  head.lease = request.lease;
  head.arrival = request.arrival;
  if (request.has_notify) head.flags |= kHasNotify;
  if (request.has_arrival) head.flags |= kHasArrival;
  if (flight.staged) head.flags |= kStaged;
  if (flight.window) head.flags |= kPushed;
  if (request.local && request.local->is_on_gpu()) head.flags |= kOnGpu;
  next_segments(request, flight, segments_);
  head.num_segments = static_cast<uint32_t>(segments_.size());
  head.num_rows = rows_.num();
  const auto parts = {view_of(head), ByteView(request.notify), rows_.bytes(),
                      view_of(std::span<const Segment>(segments_))};
  if (!may_wait) return channel_.try_message(Type::kRequest, parts);
  channel_.message(Type::kRequest, parts);
  return Sent::kSent;
}

Status Outgoing::post(const RequestPtr& request, bool& needs_pump) noexcept {
  RegionMemoryPtr memory;
  if (request->nbytes > 0 && request->local) memory = memory_.find(request->local->id);

  std::lock_guard lock(mutex_);
  if (dead_) return {Code::kPeerDisconnected};
  if (flights_.full() || num_dead_inside_ > 0) {
    room_wanted_.store(true, std::memory_order_relaxed);
    return {Code::kAgain};
  }
  const uint32_t slot = flights_.next();
  Flight& flight = flights_[slot];
  const Ticket ticket{slot, flight.generation + 1};
  flight.memory = memory;
  std::shared_ptr<PushWindow> window = memory ? window_of(*request) : nullptr;
  if (window && window->state == PushWindow::State::kAsked) {
    window->waiting.push_back(ticket);
    flight.window = std::move(window);
    flight.unsent = true;
    ++flight.generation;
    flights_.occupy(request);
    return {};
  }
  route(*request, flight, std::move(window));
  // Before the attempt: room comes with a completion, and whoever sees that looks at this.
  const bool wanted = room_wanted_.exchange(true, std::memory_order_relaxed);
  if (send_request(ticket, *request, flight, false) != Sent::kSent) {
    flights_.reset(slot);
    // A channel that is broken ends the connection, and that every request.
    return {Code::kAgain};
  }
  room_wanted_.store(wanted, std::memory_order_relaxed);
  ++flight.generation;
  flights_.occupy(request);
  needs_pump = flight.window || (flight.staged && request->op == Op::kWrite);
  if (needs_pump) queue(flight.window ? pushing_ : pumping_, ticket, flight);
  return {};
}

void Outgoing::queue(std::deque<Ticket>& where, Ticket ticket, Flight& flight) {
  if (std::exchange(flight.queued, true)) return;
  where.push_back(ticket);
  if (&where == &pumping_) any_pumping_.store(true, std::memory_order_relaxed);
  if (&where == &pushing_) any_pushing_.store(true, std::memory_order_relaxed);
}

Cancelled Outgoing::cancel(const RequestPtr& request, bool& unanswered) noexcept {
  std::lock_guard lock(mutex_);
  const auto slot = flights_.slot_of(*request);
  if (!slot) return {Agreement::kEnding, true};
  Flight& flight = flights_[*slot];
  Cancelled result;
  if (flight.unsent) {
    std::erase_if(flight.window->waiting, [&](const Ticket& each) { return each.slot == *slot; });
    --flight.generation;  // nobody was told of it, and immediates count them
    flights_.release(*slot);
    return {Agreement::kStopped, true};
  }
  if (flight.window) {
    result.agreement = flight.accepted ? Agreement::kAlreadyAccepted : Agreement::kUnknown;
    result.quiesced = flight.num_inside == 0;
    unanswered = !result.quiesced;
    if (!flight.is_dead()) num_dead_inside_ += flight.num_inside;
    if (flight.accepted) connection_.counters.carried(Op::kWrite, request->nbytes);
  } else if (request->op == Op::kRead) {
    // Its destination is ours: what we throw away can never be accepted.
    result.agreement = Agreement::kStopped;
    result.quiesced = !flight.inside && flight.num_inside == 0;
  } else {
    result.agreement = Agreement::kUnknown;
    const bool read_by_peer = request->op == Op::kWrite && !flight.staged && !source_gone_;
    result.quiesced = !flight.inside && !read_by_peer;
    unanswered = read_by_peer;
  }
  flight.cancelled = true;
  flight.unquiet = !result.quiesced;
  flight.cancelled_ns = now_ns();
  channel_.message(Type::kAbort, {view_of(PartHead{{*slot, flight.generation}, 0})});
  return result;
}

bool Outgoing::room_wanted() noexcept {
  if (!room_wanted_.load(std::memory_order_relaxed)) return false;
  std::lock_guard lock(mutex_);
  return !flights_.full() && num_dead_inside_ == 0 &&
         room_wanted_.exchange(false, std::memory_order_relaxed);
}

int64_t Outgoing::unanswered_since(bool pushed) noexcept {
  std::lock_guard lock(mutex_);
  int64_t since = kNever;
  if (source_gone_ && !pushed) return since;
  for (const Flight& flight : flights_)
    if (flight.request && flight.cancelled && flight.unquiet && flight.request->op == Op::kWrite &&
        !flight.staged && (flight.window != nullptr) == pushed)
      since = std::min(since, flight.cancelled_ns);
  return since;
}

void Outgoing::source_gone() {
  std::vector<RequestPtr> quiet;
  {
    std::lock_guard lock(mutex_);
    source_gone_ = true;
    for (Flight& flight : flights_)
      if (flight.request && flight.cancelled && flight.request->op == Op::kWrite &&
          !flight.staged && !flight.window && std::exchange(flight.unquiet, false))
        quiet.push_back(flight.request);
  }
  for (const RequestPtr& request : quiet) host_.quiesced(*request);
}

void Outgoing::source_there() noexcept {
  std::lock_guard lock(mutex_);
  source_gone_ = false;
}

void Outgoing::end(Ticket ticket, Completion completion) {
  RequestPtr request;
  bool cancelled, unquiet;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr) return;
    request = flight->request;
    cancelled = flight->cancelled;
    unquiet = flight->unquiet;
    flights_.release(ticket.slot);
  }
  if (cancelled) {
    if (unquiet) host_.quiesced(*request);
    // Left open by cancel(), and now known not to have been shown.
    if (!completion.ok && request->op != Op::kRead) host_.unshown(connection_, *request);
    return;
  }
  if (completion.ok) connection_.counters.carried(request->op, request->nbytes);
  host_.ended(connection_, request, std::move(completion));
}

bool Outgoing::on_outcome(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<OutcomeHead>();
  const ByteView text = reader.take(reader.remaining());
  if (!reader.ok() || head.ticket.slot >= kNumSlots) return false;
  Completion completion;
  bool pushed = false;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(head.ticket);
    if (flight == nullptr) return true;  // of a read that we have ended
    // The last word is said once, and not of what the owner was never told.
    if (flight->unsent || std::exchange(flight->answered, true)) return false;
    const Request& request = *flight->request;
    completion = completion_of(head, request.nbytes,
                               {reinterpret_cast<const char*>(text.data()), text.size()});
    // Bytes come before the word that they have; and of a read that is pulled we judge ourselves.
    if (request.op == Op::kRead && completion.ok && !flight->cancelled &&
        (flight->landed < request.nbytes || flight->granted > 0))
      return false;
    if (!completion.ok) {
      Failure& failure = completion.failure;
      if (head.span != kNoSpan)
        failure.span = span_of(request, flight->window ? nullptr : flight->memory.get(), head.span);
    }
    if (flight->window) {
      flight->accepted = completion.ok;
      if (!completion.ok && !flight->failure) {
        if (!flight->cancelled) num_dead_inside_ += flight->num_inside;
        flight->failure = std::move(completion.failure);
      }
    } else if (flight->num_inside > 0) {  // a read: it ends when our NIC is through
      flight->over = true;
      if (!completion.ok && !flight->failure) flight->failure = std::move(completion.failure);
      return true;
    }
    pushed = flight->window != nullptr;
  }
  pushed ? settle_push(head.ticket) : end(head.ticket, std::move(completion));
  return true;
}

void Outgoing::send_part(Ticket ticket, Flight& flight) {
  next_segments(*flight.request, flight, segments_);
  const ListHead head{ticket, static_cast<uint32_t>(segments_.size()), rows_.num()};
  channel_.message(Type::kPart,
                   {view_of(head), rows_.bytes(), view_of(std::span<const Segment>(segments_))});
}

// A word of the owner about a request that is still wanted; null: it is not. False: malformed, or
// about one that the owner was never told of.
bool Outgoing::on_part(ByteView body, Ticket& ticket, Flight*& flight) noexcept {
  Reader reader(body);
  ticket = reader.get<PartHead>().ticket;
  flight = flights_.find(ticket);
  if (flight != nullptr && flight->cancelled) flight = nullptr;
  return reader.finished() && ticket.slot < kNumSlots && (flight == nullptr || !flight->unsent);
}

bool Outgoing::on_more(ByteView body) {
  std::lock_guard lock(mutex_);
  Ticket ticket;
  Flight* flight;
  if (!on_part(body, ticket, flight)) return false;
  if (flight == nullptr) return true;
  if (flight->announced == flight->request->nbytes) return false;
  send_part(ticket, *flight);
  if (flight->request->op == Op::kWrite && flight->staged) queue(pumping_, ticket, *flight);
  return true;
}

void Outgoing::end_all(const Failure& cause) {
  struct Left {
    RequestPtr request;
    bool quiesce, unsent;  // it is only to be quiesced; the owner knew nothing of it
  };
  std::vector<Left> left;
  {
    std::lock_guard lock(mutex_);
    dead_ = true;
    for (uint32_t slot = 0; slot < kNumSlots; ++slot) {
      Flight& flight = flights_[slot];
      if (!flight.request) continue;
      if (!flight.cancelled)
        left.push_back({flight.request, false, flight.unsent});
      else if (flight.unquiet)
        left.push_back({flight.request, true, false});
      flights_.release(slot);
    }
    pumping_.clear();
    pushing_.clear();
    windows_.clear();
    num_dead_inside_ = 0;
  }
  push_again_.clear();
  pulling_.clear();
  again_.clear();
  words_due_.clear();
  for (auto& [request, quiesce, unsent] : left) {
    if (quiesce) {
      host_.quiesced(*request);
      continue;
    }
    // Nobody knows whether the owner had accepted a write; what a read would have shown is ours.
    host_.ended(connection_, request,
                {.ok = false, .failure = cause, .agreed = request->op == Op::kRead || unsent});
  }
}

}  // namespace kvxfer::verbs
