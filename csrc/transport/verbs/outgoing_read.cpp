// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own reads: asked for, then pulled by our NIC under a grant, or landed from messages.
//
// The words are read last, behind a fence: only when all data is here does the NIC begin with them.
// A queue pair answers READs in order, but a responder may fetch the memory of several at once, and
// a word that was fetched before the data that it speaks for would prove nothing.
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
  if (!reader.ok() || !read_list(reader, head.num_sources, sources)) return false;
  std::lock_guard lock(mutex_);
  Flight* flight = flights_.find(head.ticket);
  if (flight == nullptr || flight->cancelled) return head.ticket.slot < kNumSlots;
  uint64_t sum = 0;  // at most some thousand x 2^32: no overflow
  for (const Source& source : sources) sum += source.nbytes;
  if (flight->request->op != Op::kRead || !flight->memory || !head.region.present ||
      sum > flight->announced - flight->granted)
    return false;
  flight->region = head.region;
  flight->lease = head.lease;
  flight->granted += sum;
  flight->sources.insert(flight->sources.end(), sources.begin(), sources.end());
  // The next part is on its way while this one is pulled.
  if (flight->granted == flight->announced && flight->announced < flight->request->nbytes)
    send_part(head.ticket, *flight);
  if (!flight->sources.empty()) queue(pulling_, head.ticket, *flight);
  return true;
}

// The next of the granted bytes, as far as a chain may go. Two lists of pieces side by side.
void Outgoing::cut(const Request& request, Flight& flight, Chunk& chunk) {
  while (!flight.sources.empty()) {
    const Source& source = flight.sources.front();
    const Span& span = request.spans[flight.next_span];
    const uint64_t both =
        std::min<uint64_t>(source.nbytes - flight.source_offset, span.nbytes - flight.next_offset);
    const RegionMemory::Run run = flight.memory->at(span.local + flight.next_offset, both);
    const uint32_t n = chunk.add(source.address + flight.source_offset, source.rkey, run.base,
                                 run.lkey, run.nbytes, pulls_.max_sge());
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

void Outgoing::look_at_words(Ticket ticket, Flight& flight, Chunk& chunk) {
  auto& words = words_[ticket.slot];
  words = {flight.region.value + 1, flight.lease.value + 1};  // not open, until the NIC says so
  auto* const to = reinterpret_cast<std::byte*>(words.data());
  chunk.words = true;
  chunk.add(flight.region.address, flight.region.rkey, to, words_mr_->lkey, sizeof(uint64_t),
            pulls_.max_sge());
  if (flight.lease.present)
    chunk.add(flight.lease.address, flight.lease.rkey, to + sizeof(uint64_t), words_mr_->lkey,
              sizeof(uint64_t), pulls_.max_sge());
  flight.looked = true;
}

bool Outgoing::pull_one(int& err) {
  if ((pulling_.empty() && again_.empty()) || !pulls_.has_room()) return false;
  if (!again_.empty()) {
    ChunkPtr chunk = std::move(again_.front());
    again_.pop_front();
    if (is_wanted(*chunk)) {
      const bool fence = chunk->words;
      err = pulls_.post(std::move(chunk), fence);
    } else {
      chunk_left(chunk->ticket);
      pulls_.recycle(std::move(chunk));
    }
    return true;
  }
  const Ticket ticket = pulling_.front();
  pulling_.pop_front();
  ChunkPtr chunk;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr) return true;
    flight->queued = false;
    if (flight->cancelled || flight->over) return true;
    chunk = pulls_.new_chunk();
    chunk->ticket = ticket;
    cut(*flight->request, *flight, *chunk);
    ++flight->num_inside;
    if (!flight->sources.empty()) {
      queue(pulling_, ticket, *flight);
    } else if (flight->moved == flight->request->nbytes && !flight->looked) {
      ChunkPtr look = pulls_.new_chunk();
      look->ticket = ticket;
      look_at_words(ticket, *flight, *look);
      ++flight->num_inside;
      again_.push_back(std::move(look));  // right behind this one
    }
  }
  hooks::reached(hooks::Point::kInsideRead);
  err = pulls_.post(std::move(chunk), false);
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
  pulls_.recycle(std::move(chunk));
  settle(ticket);
}

void Outgoing::on_flushed(ChunkPtr chunk) {
  if (is_wanted(*chunk)) {
    // Before the words of its own request, which may be waiting here for room: they are read last.
    const auto words = std::ranges::find_if(again_, [&](const ChunkPtr& other) {
      return other->words && other->ticket.slot == chunk->ticket.slot;
    });
    again_.insert(words, std::move(chunk));  // still counted in num_inside
    return;
  }
  chunk_left(chunk->ticket);
  pulls_.recycle(std::move(chunk));
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
                    data.size() <= flight.announced - flight.landed;
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
