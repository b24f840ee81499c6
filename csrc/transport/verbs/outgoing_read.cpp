// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own reads: asked for, then pulled by our NIC under a grant, or landed from messages.
//
// The words are read last, when all data is here. Where what is missing is under way on one rail,
// they go behind it with a fence, so that this NIC begins with them only when that has come: a
// queue pair answers READs in order, but a responder may fetch the memory of several at once, and a
// word that was fetched before the data that it speaks for would prove nothing. Where it is on
// several rails, between which nothing is ordered, or the device's fence is not sound, they wait
// for its completions.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.hpp"
#include "common/hooks.hpp"
#include "transport/verbs/outgoing.hpp"

namespace kvxfer::verbs {

bool Outgoing::on_granted(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<GrantHead>();
  std::vector<Source> sources;
  KeyRowsPtr rows;
  if (!reader.ok() || !read_rows(reader, head.num_rows, rails_.size(), rows) || !rows ||
      !read_list(reader, head.num_sources, sources))
    return false;
  std::lock_guard lock(mutex_);
  Flight* flight = flights_.find(head.ticket);
  if (flight == nullptr || flight->cancelled) return head.ticket.slot < kNumSlots;
  uint64_t sum = 0;  // at most some thousand x 2^32: no overflow
  for (const Source& source : sources) {
    if (source.row >= rows->size()) return false;
    sum += source.nbytes;
  }
  // One way or the other: what came in messages stands where the first chain would begin.
  const bool in_messages = flight->landed > 0 && flight->granted == 0;
  if (flight->request->op != Op::kRead || !flight->memory || !head.region.present || in_messages ||
      sum > flight->announced - flight->granted)
    return false;
  flight->region = head.region;
  flight->lease = head.lease;
  flight->word_keys = (*rows)[0];
  flight->granted += sum;
  for (const Source& source : sources) flight->sources.push_back({source, rows});
  // The next part is on its way while this one is pulled.
  if (flight->granted == flight->announced && flight->announced < flight->request->nbytes)
    send_part(head.ticket, *flight);
  if (!flight->sources.empty()) queue(pulling_, head.ticket, *flight);
  return true;
}

// The next of the granted bytes, as far as a chain may go. Two lists of pieces side by side.
void Outgoing::cut(const Request& request, Flight& flight, Chunk& chunk) {
  while (!flight.sources.empty()) {
    const Flight::Granted& source = flight.sources.front();
    const Span& span = request.spans[flight.next_span];
    const uint64_t both =
        std::min<uint64_t>(source.nbytes - flight.source_offset, span.nbytes - flight.next_offset);
    const RegionMemory::Run run = flight.memory->at(span.local + flight.next_offset, both);
    const uint32_t n = chunk.add(source.address + flight.source_offset, (*source.rows)[source.row],
                                 run.base, run.registration->lkeys(), run.nbytes, rails_.max_sge());
    flight.moved += n;
    flight.source_offset += n;
    flight.next_offset += n;
    if (flight.next_offset == span.nbytes) ++flight.next_span, flight.next_offset = 0;
    if (flight.source_offset == source.nbytes) {
      flight.sources.pop_front();
      flight.source_offset = 0;
    }
    if (n < run.nbytes) return;
  }
}

// Where the words may be read now: behind all data that is still missing, if one rail has it all.
// Null: not yet. Once it is landed any will do.
Rail* Outgoing::rail_for_words(Ticket ticket, const Flight& flight) const noexcept {
  const uint64_t missing = flight.request->nbytes - flight.landed;
  if (missing == 0) return rails_.pick(flight.memory->preference());
  for (const auto& rail : rails_) {
    if (!rail->device->has_sound_fence()) continue;
    uint64_t nbytes = 0;
    for (const ChunkPtr& chunk : rail->pulls.in_flight())
      if (!chunk->job && !chunk->probe && chunk->ticket.slot == ticket.slot)
        nbytes += chunk->nbytes();
    if (nbytes == missing) return rail->pulls.has_room() ? rail.get() : nullptr;
  }
  return nullptr;
}

// The words of one read whose chains are all posted, if it is time for any.
bool Outgoing::look_at_words() {
  std::lock_guard lock(mutex_);
  for (auto it = words_due_.begin(); it != words_due_.end(); ++it) {
    const Ticket ticket = *it;
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr || flight->cancelled || flight->over) {
      words_due_.erase(it);
      return true;
    }
    Rail* const rail = rail_for_words(ticket, *flight);
    if (rail == nullptr) continue;
    words_due_.erase(it);
    const bool fence = flight->landed < flight->request->nbytes;  // else nothing is to be awaited
    auto& words = words_[ticket.slot];
    words = {flight->region.value + 1, flight->lease.value + 1};  // not open, until the NIC says so
    auto* const to = reinterpret_cast<std::byte*>(words.data());
    ChunkPtr chunk = rails_.new_chunk();
    chunk->ticket = ticket;
    chunk->words = true;
    const auto add = [&](const WordSpot& spot, std::byte* at) {
      chunk->add(spot.address, flight->word_keys, at, words_registration_.lkeys(), sizeof(uint64_t),
                 rails_.max_sge());
    };
    add(flight->region, to);
    if (flight->lease.present) add(flight->lease, to + sizeof(uint64_t));
    ++flight->num_inside;
    rail->pulls.post(std::move(chunk), fence);
    return true;
  }
  return false;
}

// The rail for the next chain of this read. Null: none has room. False: nobody wants it any more.
bool Outgoing::pick(Ticket ticket, Rail*& rail) noexcept {
  const Flight* flight = flights_.find(ticket);
  rail = nullptr;
  if (flight == nullptr || flight->cancelled || flight->over) return false;
  rail = rails_.pick(flight->memory->preference());
  return true;
}

// What one rail has no room for does not keep others from theirs.
bool Outgoing::pull_one() {
  if (!words_due_.empty() && look_at_words()) return true;
  return (!again_.empty() && pull_again()) || (!pulling_.empty() && pull_next());
}

bool Outgoing::pull_again() {
  for (auto it = again_.begin(); it != again_.end(); ++it) {
    const Ticket ticket = (*it)->ticket;
    Rail* rail;
    bool wanted;
    {
      std::lock_guard lock(mutex_);
      wanted = pick(ticket, rail);
    }
    if (wanted && rail == nullptr) continue;
    ChunkPtr chunk = std::move(*it);
    again_.erase(it);
    if (wanted) {
      rail->pulls.post(std::move(chunk), false);
    } else {
      rails_.recycle(std::move(chunk));
      chunk_left(ticket);
    }
    return true;
  }
  return false;
}

bool Outgoing::drop_unwanted() {
  const auto it = std::ranges::find_if(again_, [&](const auto& each) { return !is_wanted(*each); });
  if (it == again_.end()) return false;
  const Ticket ticket = (*it)->ticket;
  rails_.recycle(std::move(*it));
  again_.erase(it);
  chunk_left(ticket);
  return true;
}

bool Outgoing::pull_next() {
  ChunkPtr chunk;
  Rail* rail = nullptr;
  {
    std::lock_guard lock(mutex_);
    for (auto it = pulling_.begin(); it != pulling_.end(); ++it) {
      const Ticket ticket = *it;
      const bool wanted = pick(ticket, rail);
      if (wanted && rail == nullptr) continue;
      pulling_.erase(it);
      Flight* const flight = flights_.find(ticket);
      if (flight != nullptr) flight->queued = false;
      if (!wanted) return true;
      chunk = rails_.new_chunk();
      chunk->ticket = ticket;
      cut(*flight->request, *flight, *chunk);
      ++flight->num_inside;
      if (!flight->sources.empty())
        queue(pulling_, ticket, *flight);
      else if (flight->moved == flight->request->nbytes)
        words_due_.push_back(ticket);
      break;
    }
  }
  if (!chunk) return false;
  hooks::reached(hooks::Point::kInsideRead);
  rail->pulls.post(std::move(chunk), false);
  return true;
}

bool Outgoing::is_wanted(const Chunk& chunk) noexcept {
  std::lock_guard lock(mutex_);
  const Flight* flight = flights_.find(chunk.ticket);
  return flight != nullptr && !flight->cancelled && !flight->over;
}

// One chunk less that our NIC may store into.
void Outgoing::chunk_left(Ticket ticket) {
  {
    std::lock_guard lock(mutex_);
    --flights_[ticket.slot].num_inside;
  }
  settle(ticket);
}

std::optional<Failure> Outgoing::judge(const Flight& flight, uint32_t slot) const {
  const auto& words = words_[slot];
  if (flight.landed != flight.request->nbytes)
    return Failure{.code = Code::kInternal, .text = "words came before the data of a read"};
  if (flight.lease.present && words[1] != flight.lease.value)
    return Failure{.code = Code::kLease, .text = "the lease ended before the read was complete"};
  if (words[0] != flight.region.value)
    return Failure{.code = Code::kRemoteAccess,
                   .text = "the region was deregistered before the read was complete"};
  return {};
}

void Outgoing::on_landed(ChunkPtr chunk, std::optional<Failure> failure) {
  const Ticket ticket = chunk->ticket;
  {
    std::lock_guard lock(mutex_);
    Flight& flight = flights_[ticket.slot];  // it stays while a chunk of it is inside
    --flight.num_inside;
    if (!chunk->words && !failure) flight.landed += chunk->nbytes();
    if (chunk->words && !failure) failure = judge(flight, ticket.slot);
    if (failure || chunk->words) flight.over = true;
    if (failure && !flight.failure) flight.failure = std::move(failure);
  }
  rails_.recycle(std::move(chunk));
  settle(ticket);
}

void Outgoing::on_flushed(ChunkPtr chunk) {
  const Ticket ticket = chunk->ticket;
  if (is_wanted(*chunk) && !chunk->words) {
    again_.push_back(std::move(chunk));  // still counted in num_inside
    return;
  }
  if (chunk->words) words_due_.push_back(ticket);  // if it is still wanted
  rails_.recycle(std::move(chunk));
  chunk_left(ticket);
}

// What there is to say once our NIC is through with a read. Under the lock a cancel comes before
// its end, and then the owner hears of that alone, or after it, and finds nothing.
void Outgoing::settle(Ticket ticket) {
  RequestPtr request, quiet;
  Completion completion;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr || flight->num_inside > 0) return;
    if (flight->cancelled) {
      if (std::exchange(flight->unquiet, false)) quiet = flight->request;
      if (flight->answered) flights_.release(ticket.slot);
    } else if (flight->over) {
      request = flight->request;
      completion.ok = !flight->failure;
      completion.nbytes = flight->landed;
      if (flight->failure) completion.failure = std::move(*flight->failure);
      channel_.message(completion.ok ? Type::kReadDone : Type::kAbort,
                       {view_of(PartHead{ticket, 0})});
      flights_.release(ticket.slot);
    }
  }
  if (quiet) host_.quiesced(*quiet);
  if (!request) return;
  if (completion.ok) connection_.counters.carried(Op::kRead, request->nbytes);
  host_.ended(connection_, request, std::move(completion));
}

bool Outgoing::on_read_data(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<DataHead>();
  const ByteView data = reader.take(reader.remaining());
  if (!reader.ok() || data.empty() || data.size() != head.nbytes || head.ticket.slot >= kNumSlots)
    return false;
  const RequestPtr request = enter(head.ticket);
  if (!request) {
    connection_.counters.bytes_sunk.fetch_add(data.size(), std::memory_order_relaxed);
    return true;
  }
  hooks::reached(hooks::Point::kInsideRead);
  Flight& flight = flights_[head.ticket.slot];
  const bool sane = request->op == Op::kRead && flight.granted == 0 &&
                    data.size() <= flight.announced - flight.landed && !request->local->is_on_gpu();
  const std::byte* from = data.data();
  for (size_t left = sane ? data.size() : 0; left > 0;) {
    const Span& span = request->spans[flight.next_span];
    const uint64_t n = std::min<uint64_t>(left, span.nbytes - flight.next_offset);
    request->local->resolve(span.local + flight.next_offset, n, [&](std::byte* to, size_t size) {
      std::memcpy(to, from, size);
      from += size;
    });
    left -= n;
    flight.next_offset += n;
    if (flight.next_offset == span.nbytes) ++flight.next_span, flight.next_offset = 0;
  }
  if (sane) flight.landed += data.size();
  leave(head.ticket, *request);
  return sane;
}

}  // namespace kvxfer::verbs
