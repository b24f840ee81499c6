// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/outgoing.hpp"

#include <algorithm>
#include <cstring>

#include "common/hooks.hpp"

namespace kvxfer::shm {

namespace {
// A read asks for more spans when less than this is still to come: keeps the owner busy, bounds
// what it must remember.
constexpr uint64_t kReadAhead = kStageBytes / 2;
}  // namespace

Outgoing::Outgoing(Channel& channel, Connection& connection, Host& host, Show show, void* context)
    : channel_(channel),
      connection_(connection),
      host_(host),
      show_(show),
      context_(context),
      flights_(kNumSlots) {
  free_.reserve(kNumSlots);
  for (uint32_t slot = kNumSlots; slot-- > 0;) free_.push_back(slot);
}

Outgoing::Flight* Outgoing::find(Ticket ticket) noexcept {
  if (ticket.slot >= kNumSlots) return nullptr;
  Flight& flight = flights_[ticket.slot];
  return flight.request && flight.generation == ticket.generation ? &flight : nullptr;
}

void Outgoing::release(uint32_t slot) noexcept {
  Flight& flight = flights_[slot];
  by_id_.erase(flight.request->id);
  const uint32_t generation = flight.generation;
  flight = Flight{};
  flight.generation = generation;
  free_.push_back(slot);
}

std::vector<SpanRecord> Outgoing::spans_from(const Request& request, size_t first) const {
  std::vector<SpanRecord> records;
  const size_t last = std::min(request.spans.size(), first + kMaxSpansPerRecord);
  records.reserve(last - first);
  for (size_t i = first; i < last; ++i) {
    const Span& span = request.spans[i];
    records.push_back({span.local, span.remote, span.nbytes, static_cast<uint32_t>(i)});
  }
  return records;
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
  std::vector<SpanRecord> spans;
  if (mapped) {
    head.flags |= kMapped;
    head.source = request->local->id;
  }
  if (request->op == Op::kRead) head.flags |= kMapped;  // where the owner can let us pull
  // A read starts with its first spans and asks for the rest as it goes.
  if (request->op == Op::kRead || (mapped && request->spans.size() <= kMaxSpansPerRecord)) {
    spans = spans_from(*request, 0);
    if (spans.size() == request->spans.size()) head.flags |= kInline;
  }
  head.num_spans = static_cast<uint32_t>(spans.size());
  needs_pump = request->op == Op::kWrite && request->nbytes > 0 && (head.flags & kInline) == 0;

  std::lock_guard lock(mutex_);
  if (dead_) return {Code::kPeerDisconnected};
  if (free_.empty()) {
    room_wanted_ = true;
    return {Code::kAgain};
  }
  const uint32_t slot = free_.back();
  Flight& flight = flights_[slot];
  head.ticket = {slot, ++flight.generation};
  // Before the record: the owner's CAS must find it.
  channel_.my_slot(slot).store(slot_word(flight.generation, Slot::kPosted),
                               std::memory_order_release);
  if (!channel_.try_message(Type::kRequest, {view_of(head), request->notify, view_of(spans)})) {
    room_wanted_ = true;
    return {Code::kAgain};
  }
  free_.pop_back();
  flight.request = request;
  flight.mapped = mapped;
  flight.asked_spans = spans.size();
  for (const SpanRecord& span : spans) flight.asked += span.nbytes;
  by_id_.emplace(request->id, slot);
  if (needs_pump) pumping_.push_back(head.ticket);
  return {};
}

Cancelled Outgoing::cancel(const RequestPtr& request) noexcept {
  std::lock_guard lock(mutex_);
  const auto found = by_id_.find(request->id);
  if (found == by_id_.end()) return {Agreement::kEnding, true};
  const uint32_t slot = found->second;
  Flight& flight = flights_[slot];
  uint64_t posted = slot_word(flight.generation, Slot::kPosted);
  const bool ours = channel_.my_slot(slot).compare_exchange_strong(
      posted, slot_word(flight.generation, Slot::kCancelled), std::memory_order_acq_rel);
  Agreement agreement = Agreement::kStopped;
  if (!ours && posted == slot_word(flight.generation, Slot::kAccepted))
    // An accepted read has been sent, but its last bytes may not have been stored here.
    agreement = request->op == Op::kRead ? Agreement::kUnknown : Agreement::kAlreadyAccepted;
  flight.cancelled = true;
  channel_.message(Type::kAbort, {view_of(PartHead{{slot, flight.generation}, 0})});
  return {agreement, !flight.inside};
}

bool Outgoing::room_wanted() noexcept {
  std::lock_guard lock(mutex_);
  return !free_.empty() && std::exchange(room_wanted_, false);
}

void Outgoing::end(Ticket ticket, Completion completion) {
  RequestPtr request;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = find(ticket);
    if (flight == nullptr) return;
    if (!flight->cancelled) request = flight->request;
    release(ticket.slot);
  }
  if (!request) return;
  if (completion.ok && request->op != Op::kNotify)
    (request->op == Op::kRead ? connection_.counters.bytes_read
                              : connection_.counters.bytes_written)
        .fetch_add(request->nbytes, std::memory_order_relaxed);
  host_.ended(connection_, request, std::move(completion));
}

bool Outgoing::on_outcome(const OutcomeHead& outcome, std::string text) {
  Completion completion;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = find(outcome.ticket);
    if (flight == nullptr) return outcome.ticket.slot < kNumSlots;
    const Request& request = *flight->request;
    completion.ok = outcome.code == 0;
    if (completion.ok && request.op == Op::kRead && flight->landed < request.nbytes &&
        !flight->cancelled) {
      flight->accepted = true;  // the rest is in the bulk ring
      return true;
    }
    completion.nbytes = completion.ok ? request.nbytes : std::min(outcome.nbytes, request.nbytes);
    if (!completion.ok) {
      Failure& failure = completion.failure;
      failure.code = outcome.code <= kMaxCode ? static_cast<Code>(outcome.code) : Code::kInternal;
      failure.err = outcome.err;
      if (outcome.span < request.spans.size()) failure.span = request.spans[outcome.span].index;
      failure.expected = outcome.expected;
      failure.given = outcome.given;
      failure.text = std::move(text);
    }
  }
  end(outcome.ticket, std::move(completion));
  return true;
}

RequestPtr Outgoing::enter(Ticket ticket) noexcept {
  std::lock_guard lock(mutex_);
  Flight* flight = find(ticket);
  if (flight == nullptr || flight->cancelled) return nullptr;
  flight->inside = true;
  return flight->request;
}

void Outgoing::leave(Ticket ticket, Request& request) noexcept {
  bool report;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = find(ticket);
    flight->inside = false;
    report = flight->cancelled;  // cancel() came meanwhile and said "not quiesced"
  }
  if (report) host_.quiesced(request);
}

void Outgoing::ask(Ticket ticket, const Request& request, Flight& flight) {
  // Of a granted read the next part is under way while this one is pulled; of a staged one, what
  // fills the ring.
  const auto wants_more = [&flight] {
    return flight.memory ? flight.asked_spans == flight.granted
                         : flight.asked - flight.landed < kReadAhead;
  };
  while (flight.asked_spans < request.spans.size() && wants_more()) {
    const std::vector<SpanRecord> spans = spans_from(request, flight.asked_spans);
    flight.asked_spans += spans.size();
    for (const SpanRecord& span : spans) flight.asked += span.nbytes;
    channel_.message(Type::kReadPart, {view_of(PartHead{ticket, spans.size()}), view_of(spans)});
  }
}

bool Outgoing::on_read_data(const StageHead& head, const std::byte* bytes) {
  const RequestPtr request = enter(head.ticket);
  if (!request) {
    connection_.counters.bytes_sunk.fetch_add(head.nbytes, std::memory_order_relaxed);
    return true;
  }
  hooks::reached(hooks::Point::kInsideRead);
  Flight& flight = flights_[head.ticket.slot];
  const bool sane = request->op == Op::kRead && head.nbytes <= flight.asked - flight.landed;
  uint64_t left = sane ? head.nbytes : 0;
  while (left > 0) {
    const Span& span = request->spans[flight.span];
    const uint64_t n = std::min<uint64_t>(left, span.nbytes - flight.offset);
    request->local->resolve(span.local + flight.offset, n, [&bytes](std::byte* to, size_t size) {
      std::memcpy(to, bytes, size);
      bytes += size;
    });
    left -= n;
    flight.offset += n;
    if (flight.offset == span.nbytes) ++flight.span, flight.offset = 0;
  }
  if (sane) flight.landed += head.nbytes;
  const bool complete = flight.accepted && flight.landed == request->nbytes;
  leave(head.ticket, *request);
  if (complete)
    end(head.ticket, {true, request->nbytes, {}});
  else if (sane)
    ask(head.ticket, *request, flight);
  return sane;
}

bool Outgoing::on_granted(const GrantHead& head, std::shared_ptr<PeerMemory> memory) {
  RequestPtr request;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = find(head.ticket);
    if (flight == nullptr) return head.ticket.slot < kNumSlots;
    if (flight->cancelled) return true;
    request = flight->request;
  }
  Flight& flight = flights_[head.ticket.slot];
  if (request->op != Op::kRead || head.num_spans <= flight.granted ||
      head.num_spans > flight.asked_spans)
    return false;
  if (!memory) memory = flight.memory;
  if (!memory) {  // shown before it was granted, so it was withdrawn since
    end_pulled(head.ticket, Failure{.code = Code::kRemoteAccess,
                                    .text = "the region was deregistered before the read"});
    return true;
  }
  for (size_t i = flight.granted; i < head.num_spans; ++i) {
    const Span& span = request->spans[i];
    if (span.remote > memory->nbytes() || span.nbytes > memory->nbytes() - span.remote)
      return false;  // the owner has granted what it did not show
  }
  flight.memory = std::move(memory);
  flight.watch = {head.region_word, head.lease_word};
  flight.granted = head.num_spans;
  if (!std::exchange(flight.pulling, true)) pulling_.push_back(head.ticket);
  ask(head.ticket, *request, flight);
  return true;
}

bool Outgoing::pull_one() {
  if (pulling_.empty()) return false;
  const Ticket ticket = pulling_.front();
  pulling_.pop_front();
  const RequestPtr request = enter(ticket);
  if (!request) return true;  // ended or cancelled: forgotten
  hooks::reached(hooks::Point::kInsideRead);
  Flight& flight = flights_[ticket.slot];
  const ChunkLimit limit = flight.memory->limit();
  uint64_t left = limit.nbytes;
  pulls_.clear();
  while (left > 0 && pulls_.size() < limit.num_pulls && flight.span < flight.granted) {
    const Span& span = request->spans[flight.span];
    uint64_t from = span.remote + flight.offset;
    const uint64_t begin = from, n = std::min<uint64_t>(left, span.nbytes - flight.offset);
    request->local->resolve(span.local + flight.offset, n, [&](std::byte* to, size_t size) {
      if (pulls_.size() == limit.num_pulls) return;
      pulls_.push_back({to, from, size, static_cast<uint32_t>(flight.span)});
      from += size;
    });
    left -= from - begin;
    flight.offset += from - begin;
    if (flight.offset == span.nbytes) ++flight.span, flight.offset = 0;
  }
  std::optional<Failure> failure = flight.memory->pull(pulls_, flight.watch);
  if (!failure) flight.landed += limit.nbytes - left;
  if (failure && failure->span < request->spans.size())
    failure->span = request->spans[failure->span].index;
  const bool finished = failure || flight.landed == request->nbytes;
  flight.pulling = !finished && flight.span < flight.granted;
  if (flight.pulling) pulling_.push_back(ticket);
  leave(ticket, *request);
  if (finished) end_pulled(ticket, std::move(failure));
  return true;
}

// The one end of a granted read that nobody else brings: under the lock a cancel comes before it,
// and then the owner hears of that alone, or after it, and finds nothing.
void Outgoing::end_pulled(Ticket ticket, std::optional<Failure> failure) {
  RequestPtr request;
  Completion completion;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = find(ticket);
    if (flight == nullptr || flight->cancelled) return;
    request = flight->request;
    completion.nbytes = flight->landed;
    channel_.message(failure ? Type::kAbort : Type::kReadDone, {view_of(PartHead{ticket, 0})});
    release(ticket.slot);
  }
  completion.ok = !failure;
  if (failure)
    completion.failure = std::move(*failure);
  else
    connection_.counters.bytes_read.fetch_add(request->nbytes, std::memory_order_relaxed);
  host_.ended(connection_, request, std::move(completion));
}

bool Outgoing::pump_spans(Ticket ticket, const Request& request, Flight& flight, bool& finished) {
  const std::vector<SpanRecord> spans = spans_from(request, flight.span);
  if (!channel_.bulk(Type::kSpans, {view_of(PartHead{ticket, spans.size()}), view_of(spans)}))
    return false;
  flight.span += spans.size();
  finished = flight.span == request.spans.size();
  return true;
}

bool Outgoing::pump_staged(Ticket ticket, const Request& request, Flight& flight, bool& finished) {
  std::byte* stage = channel_.stage();
  if (stage == nullptr) return false;
  std::vector<SpanRecord> targets;
  size_t span = flight.span;
  uint64_t offset = flight.offset;
  uint32_t filled = 0;
  while (filled < kStageSlotBytes && span < request.spans.size() &&
         targets.size() < kMaxSpansPerRecord) {
    const Span& from = request.spans[span];
    const auto n =
        static_cast<uint32_t>(std::min<uint64_t>(from.nbytes - offset, kStageSlotBytes - filled));
    targets.push_back({0, from.remote + offset, n, static_cast<uint32_t>(span)});
    request.local->resolve(from.local + offset, n, [&](const std::byte* bytes, size_t size) {
      std::memcpy(stage + filled, bytes, size);
      filled += static_cast<uint32_t>(size);
    });
    offset += n;
    if (offset == from.nbytes) ++span, offset = 0;
  }
  const StageHead head{ticket, channel_.stage_slot(), filled, targets.size()};
  if (!channel_.bulk(Type::kStaged, {view_of(head), view_of(targets)})) return false;
  channel_.stage_used();
  flight.span = span;
  flight.offset = offset;
  finished = span == request.spans.size();
  return true;
}

bool Outgoing::pump() {
  Ticket ticket;
  {
    std::lock_guard lock(mutex_);
    if (pumping_.empty()) return false;
    ticket = pumping_.front();
    pumping_.pop_front();
  }
  const RequestPtr request = enter(ticket);
  if (!request) return true;  // ended or cancelled: forgotten
  Flight& flight = flights_[ticket.slot];
  bool finished = false;
  const bool progressed = flight.mapped ? pump_spans(ticket, *request, flight, finished)
                                        : pump_staged(ticket, *request, flight, finished);
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
      // If the peer died after it accepted, the bytes are where they belong: done.
      const bool accepted = flight.request->op != Op::kRead &&
                            channel_.my_slot(slot).load(std::memory_order_acquire) ==
                                slot_word(flight.generation, Slot::kAccepted);
      if (!flight.cancelled) left.emplace_back(flight.request, accepted);
      release(slot);
    }
    pumping_.clear();
    pulling_.clear();
  }
  for (auto& [request, accepted] : left) {
    Completion completion;
    completion.ok = accepted;
    completion.nbytes = accepted ? request->nbytes : 0;
    if (!accepted) completion.failure = cause;
    host_.ended(connection_, request, std::move(completion));
  }
}

}  // namespace kvxfer::shm
