// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own writes that are pushed: through the window of their lease (outgoing_windows.cpp), in
// chains whose last request tells the owner which of them it was.
//
// A chain whose queue pair has failed is in doubt. It is not posted again before the owner has said
// that it does not have it and that the old queue pair takes nothing any more: else it could land
// a second time in memory that was accepted and used again.
#include <algorithm>
#include <utility>

#include "common/error.hpp"
#include "transport/verbs/outgoing.hpp"

namespace kvxfer::verbs {
namespace {
constexpr Keys kNoKeys{};
}  // namespace

void Outgoing::cut_push(const Request& request, Flight& flight, Chunk& chunk) {
  while (flight.moved < request.nbytes) {
    const Span& span = request.spans[flight.next_span];
    const RegionMemory::Run run =
        flight.memory->at(span.local + flight.next_offset, span.nbytes - flight.next_offset);
    const uint64_t to =
        flight.window->address + (span.remote + flight.next_offset - flight.window->offset);
    const uint32_t n =
        chunk.add(to, kNoKeys, run.base, run.registration->lkeys(), run.nbytes, rails_.max_sge());
    flight.moved += n;
    flight.next_offset += n;
    if (flight.next_offset == span.nbytes) ++flight.next_span, flight.next_offset = 0;
    if (n < run.nbytes) return;
  }
}

bool Outgoing::push_one() {
  if (!push_again_.empty() && push_again()) return true;
  if (!any_pushing_.load(std::memory_order_relaxed)) return false;
  ChunkPtr chunk;
  Rail* rail = nullptr;
  {
    std::lock_guard lock(mutex_);
    any_pushing_.store(!pushing_.empty(), std::memory_order_relaxed);
    for (auto it = pushing_.begin(); it != pushing_.end(); ++it) {
      const Ticket ticket = *it;
      Flight* const flight = flights_.find(ticket);
      const bool wanted = flight != nullptr && flight->window && !flight->is_dead() &&
                          !flight->answered && flight->window->state == PushWindow::State::kOpen;
      if (wanted) {
        // A retry is not overtaken by what is left of its dead predecessor.
        if (flight->num_chains == 0 && num_dead_inside_ > 0) continue;
        rail = rails_.pick_push(flight->memory->preference(), *flight->window);
        if (rail == nullptr) continue;
      }
      pushing_.erase(it);
      if (flight != nullptr) flight->queued = false;
      if (!wanted) return true;
      chunk = rails_.new_chunk();
      chunk->ticket = ticket;
      chunk->window = flight->window;
      chunk->on_gpu = flight->memory->is_on_gpu();
      cut_push(*flight->request, *flight, *chunk);
      const bool last = flight->moved == flight->request->nbytes;
      chunk->immediate =
          Immediate{ticket.slot, ticket.generation, flight->num_chains++, last}.pack();
      ++flight->num_inside;
      ++flight->window->num_inside;
      if (!last) queue(pushing_, ticket, *flight);
      break;
    }
  }
  if (!chunk) return false;
  ++rail->push->num_posted;
  rail->push->writes.post(std::move(chunk), false);
  return true;
}

bool Outgoing::push_again() {
  for (auto it = push_again_.begin(); it != push_again_.end(); ++it) {
    const Ticket ticket = (*it)->ticket;
    Rail* rail = nullptr;
    bool wanted;
    {
      std::lock_guard lock(mutex_);
      const Flight& flight = flights_[ticket.slot];  // it stays while a chain of it is inside
      wanted = !flight.is_dead() && flight.window->state == PushWindow::State::kOpen;
      if (wanted) rail = rails_.pick_push(flight.memory->preference(), *flight.window);
    }
    if (wanted && rail == nullptr) continue;
    ChunkPtr chunk = std::move(*it);
    push_again_.erase(it);
    if (wanted) {
      ++rail->push->num_posted;
      rail->push->writes.post(std::move(chunk), false);
    } else {
      on_pushed(std::move(chunk));
    }
    return true;
  }
  return false;
}

// One chain less that is posted, in doubt, or to be posted again.
void Outgoing::chain_left(const Chunk& chunk) {
  Flight& flight = flights_[chunk.ticket.slot];
  --flight.num_inside;
  if (flight.is_dead()) --num_dead_inside_;
  PushWindow& window = *chunk.window;
  if (--window.num_inside == 0 && window.state == PushWindow::State::kRevoked)
    channel_.message(Type::kDrained, {view_of(window.lease)});
}

void Outgoing::on_pushed(ChunkPtr chunk) {
  const Ticket ticket = chunk->ticket;
  {
    std::lock_guard lock(mutex_);
    chain_left(*chunk);
  }
  rails_.recycle(std::move(chunk));
  settle_push(ticket);
}

bool Outgoing::is_dead_push(const Chunk& chunk) noexcept {
  std::lock_guard lock(mutex_);
  return flights_[chunk.ticket.slot].is_dead();
}

void Outgoing::on_doubt(Rail& rail, ChunkPtr chunk, ibv_wc_status status) {
  const bool dead = is_dead_push(*chunk);
  rail.push->in_doubt.emplace_back(std::move(chunk), status);
  if (dead) bury(rail);
}

void Outgoing::bury(Rail& rail) {
  std::deque<std::pair<ChunkPtr, ibv_wc_status>> rest;
  for (auto& [chunk, status] : std::exchange(rail.push->in_doubt, {})) {
    if (!is_dead_push(*chunk)) {
      rest.emplace_back(std::move(chunk), status);
      continue;
    }
    {
      std::lock_guard lock(mutex_);
      ++num_dead_inside_;  // until the owner's answer
      ++rail.push->num_dead_in_doubt;
    }
    on_pushed(std::move(chunk));
  }
  rail.push->in_doubt = std::move(rest);
}

void Outgoing::on_known(Rail& rail, const std::vector<uint32_t>& held) {
  {
    std::lock_guard lock(mutex_);
    num_dead_inside_ -= std::exchange(rail.push->num_dead_in_doubt, 0);
  }
  for (auto& [chunk, status] : std::exchange(rail.push->in_doubt, {})) {
    const bool landed = std::ranges::find(held, chunk->immediate) != held.end();
    bool again = false;
    if (!landed) {
      std::lock_guard lock(mutex_);
      Flight& flight = flights_[chunk->ticket.slot];
      const bool wanted =
          !flight.is_dead() && !flight.answered && flight.window->state == PushWindow::State::kOpen;
      // REVOKE would have come before this answer: an open window's chain was refused for itself.
      again = wanted && !is_requests_own(status);
      if (wanted && !again)
        kill(chunk->ticket, flight,
             {.code = status == IBV_WC_REM_ACCESS_ERR ? Code::kRemoteAccess : Code::kTransport,
              .text = cat("an RDMA WRITE on ", rail.device->name(),
                          " failed: ", api().wc_status_str(status))});
    }
    if (again)
      push_again_.push_back(std::move(chunk));
    else
      on_pushed(std::move(chunk));
  }
}

// ---------------------------------------------------------------- their end

// It fails for a reason of ours. The owner is asked to forget it, and may say that it has accepted
// it.
void Outgoing::kill(Ticket ticket, Flight& flight, Failure failure) {
  num_dead_inside_ += flight.num_inside;
  flight.failure = std::move(failure);
  channel_.message(Type::kAbort, {view_of(PartHead{ticket, 0})});
}

// What there is to say once our NIC is through with it, and the owner has had its say.
void Outgoing::settle_push(Ticket ticket) {
  RequestPtr quiet;
  Completion completion;
  bool ends = false;
  {
    std::lock_guard lock(mutex_);
    Flight* flight = flights_.find(ticket);
    if (flight == nullptr || flight->num_inside > 0) return;
    if (flight->cancelled && std::exchange(flight->unquiet, false)) quiet = flight->request;
    ends = flight->answered;
    completion.ok = flight->accepted;
    completion.nbytes = flight->accepted ? flight->request->nbytes : 0;
    if (ends && !flight->accepted) completion.failure = std::move(*flight->failure);
  }
  if (quiet) host_.quiesced(*quiet);
  if (ends) end(ticket, std::move(completion));
}

}  // namespace kvxfer::verbs
