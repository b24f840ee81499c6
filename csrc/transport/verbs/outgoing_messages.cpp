// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own writes from, or into, memory that no NIC may touch for the other side: in messages.
#include <algorithm>
#include <cstring>
#include <utility>

#include "transport/verbs/outgoing.hpp"

namespace kvxfer::verbs {

bool Outgoing::on_use_messages(ByteView body) {
  std::lock_guard lock(mutex_);
  Ticket ticket;
  Flight* flight;
  if (!on_part(body, ticket, flight)) return false;
  if (flight == nullptr) return true;
  if (flight->request->op != Op::kWrite || flight->request->nbytes == 0 || flight->window ||
      flight->request->local->is_on_gpu() || std::exchange(flight->staged, true))
    return false;
  queue(pumping_, ticket, *flight);
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
    // cancel() came meanwhile and said "not quiesced".
    report = flight->num_inside == 0 && std::exchange(flight->unquiet, false);
  }
  if (report) host_.quiesced(request);
}

bool Outgoing::pump() {
  if (!any_pumping_.load(std::memory_order_relaxed) || !channel_.is_wide()) return false;
  Ticket ticket;
  uint64_t announced = 0;
  {
    std::lock_guard lock(mutex_);
    any_pumping_.store(!pumping_.empty(), std::memory_order_relaxed);
    if (pumping_.empty()) return false;
    ticket = pumping_.front();
    pumping_.pop_front();
    if (Flight* flight = flights_.find(ticket)) {
      flight->queued = false;
      announced = flight->announced;
    }
  }
  const RequestPtr request = enter(ticket);
  if (!request) return true;  // ended or cancelled: forgotten
  Flight& flight = flights_[ticket.slot];
  bytes_.resize(kMaxDataBytes);
  uint32_t filled = 0;
  while (filled < kMaxDataBytes && flight.moved < announced) {
    const Span& span = request->spans[flight.next_span];
    // Not beyond what was announced, though a span may be announced in parts.
    const uint64_t n = std::min({uint64_t{kMaxDataBytes} - filled, announced - flight.moved,
                                 span.nbytes - flight.next_offset});
    request->local->resolve(span.local + flight.next_offset, n,
                            [&](const std::byte* from, size_t size) {
                              std::memcpy(bytes_.data() + filled, from, size);
                              filled += static_cast<uint32_t>(size);
                            });
    flight.moved += n;
    flight.next_offset += n;
    if (flight.next_offset == span.nbytes) ++flight.next_span, flight.next_offset = 0;
  }
  if (filled > 0)
    channel_.message(Type::kWriteData,
                     {view_of(DataHead{ticket, filled, 0}), ByteView(bytes_).first(filled)});
  {
    std::lock_guard lock(mutex_);
    if (flight.moved < flight.announced) queue(pumping_, ticket, flight);
  }
  leave(ticket, *request);
  return true;
}

}  // namespace kvxfer::verbs
