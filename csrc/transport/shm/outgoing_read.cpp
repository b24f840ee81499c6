// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own reads: asked for, then pulled by us under a grant, or landed from the peer's staging
// slots.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/hooks.hpp"
#include "transport/shm/outgoing.hpp"

namespace kvxfer::shm {

namespace {
// A read asks for more spans when less than this is still to come: keeps the owner busy, bounds
// what it must remember.
constexpr uint64_t kReadAhead = kStageBytes / 2;
// The same in spans, for short ones; one record more stays within the owner's limit.
constexpr size_t kReadAheadSpans = kMaxReadSpans - kMaxSpansPerRecord;
}  // namespace

void Outgoing::ask(Ticket ticket, const Request& request, Flight& flight) {
  // Of a granted read the next part is under way while this one is pulled; of a staged one, what
  // fills the ring.
  const auto wants_more = [&flight] {
    return flight.memory ? flight.asked_spans == flight.granted
                         : flight.asked - flight.landed < kReadAhead &&
                               flight.asked_spans - flight.span < kReadAheadSpans;
  };
  while (flight.asked_spans < request.spans.size() && wants_more()) {
    const std::span<const Span> spans = spans_from(request, flight.asked_spans);
    flight.asked_spans += spans.size();
    for (const Span& span : spans) flight.asked += span.nbytes;
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
    Flight* flight = flights_.find(head.ticket);
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
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr || flight->cancelled) return;
    request = flight->request;
    completion.nbytes = flight->landed;
    channel_.message(failure ? Type::kAbort : Type::kReadDone, {view_of(PartHead{ticket, 0})});
    flights_.release(ticket.slot);
  }
  completion.ok = !failure;
  if (failure)
    completion.failure = std::move(*failure);
  else
    connection_.counters.carried(Op::kRead, request->nbytes);
  host_.ended(connection_, request, std::move(completion));
}

}  // namespace kvxfer::shm
