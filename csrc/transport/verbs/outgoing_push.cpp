// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Our own writes that are pushed: through the window of their lease, which is asked for once, in
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
constexpr size_t kMaxKnown = 4096;  // leases of which we remember that their writes are pulled
constexpr Keys kNoKeys{};

// Failures that one request's addresses or keys have caused; a flush comes from another's.
bool is_requests_own(ibv_wc_status status) {
  return status == IBV_WC_LOC_LEN_ERR || status == IBV_WC_LOC_PROT_ERR ||
         status == IBV_WC_LOC_QP_OP_ERR || status == IBV_WC_LOC_ACCESS_ERR ||
         status == IBV_WC_REM_INV_REQ_ERR || status == IBV_WC_REM_ACCESS_ERR ||
         status == IBV_WC_REM_OP_ERR;
}
}  // namespace

// ---------------------------------------------------------------- windows

// The window of the request's lease, which may be still to come; null: none is wanted.
std::shared_ptr<PushWindow> Outgoing::window_of(const Request& request) {
  if (!push_ || !no_push_.empty() || request.op != Op::kWrite || request.lease.id == 0)
    return nullptr;
  if (const auto it = windows_.find(request.lease.id); it != windows_.end())
    return it->second->state == PushWindow::State::kRefused ? nullptr : it->second;
  if (windows_.size() >= kMaxKnown)
    std::erase_if(windows_, [](const auto& each) {
      return each.second->state == PushWindow::State::kRefused;
    });
  auto window = std::make_shared<PushWindow>();
  window->lease = request.lease.id;
  windows_.emplace(window->lease, window);
  channel_.message(Type::kAskWindow, {view_of(AskWindowHead{request.remote, request.lease})});
  return window;
}

// Whether all of it lies in the lease's spans, as the owner has told them, and its chains can be
// numbered. What does not is pulled: then the owner says what is wrong with it.
bool Outgoing::fits(const Request& request, const RegionMemory& memory,
                    const PushWindow& window) const {
  uint64_t num_runs = 0;
  for (const Span& span : request.spans) {
    if (!window.covers(span.remote, span.nbytes)) return false;
    for (uint64_t offset = 0; offset < span.nbytes; ++num_runs)
      offset += memory.at(span.local + offset, span.nbytes - offset).nbytes;
  }
  // A chain ends when it is full of bytes or of requests, which cuts a run in two.
  const uint64_t by_bytes = request.nbytes / Chunk::kMaxBytes;
  return by_bytes + (num_runs + by_bytes) / Chunk::kMaxRequests + 2 <= kMaxChains;
}

void Outgoing::open_if_ready(PushWindow& window) {
  if (window.state != PushWindow::State::kAsked || window.num_extents == 0 ||
      window.extents.size() != window.num_extents || !window.any_key())
    return;
  window.state = PushWindow::State::kOpen;
  release_waiting(window);
}

// The question has been answered, one way or the other: what waited goes.
void Outgoing::release_waiting(PushWindow& window) {
  for (const Ticket& ticket : std::exchange(window.waiting, {})) {
    Flight& flight = flights_[ticket.slot];  // it waits as long as it is listed
    flight.unsent = false;
    route(*flight.request, flight, std::move(flight.window));
    (void)send_request(ticket, *flight.request, flight, true);
    if (flight.window)
      queue(pushing_, ticket, flight);
    else if (flight.staged)
      queue(pumping_, ticket, flight);
  }
}

bool Outgoing::on_window(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<WindowHead>();
  if (!reader.ok() || head.num_extents > kMaxExtents || head.num_extents == 0 ||
      head.total_extents > kMaxLeaseExtents ||
      reader.remaining() != head.num_extents * sizeof(Extent))
    return false;
  std::lock_guard lock(mutex_);
  const auto it = windows_.find(head.window);
  if (it == windows_.end()) return true;  // we have given up pushing
  if (it->second->state != PushWindow::State::kAsked) return false;
  PushWindow& window = *it->second;
  if (window.num_extents == 0) {
    window.address = head.address;
    window.offset = head.offset;
    window.nbytes = head.nbytes;
    window.num_extents = head.total_extents;
  }
  if (head.num_extents > window.num_extents - window.extents.size()) return false;
  uint64_t end = window.extents.empty() ? window.offset : window.extents.back().end;
  for (uint32_t i = 0; i < head.num_extents; ++i) {
    const auto extent = reader.get<Extent>();
    if (extent.begin < end || extent.end <= extent.begin ||
        extent.end - window.offset > window.nbytes)
      return false;
    window.extents.push_back(extent);
    end = extent.end;
  }
  open_if_ready(window);
  return true;
}

bool Outgoing::on_window_key(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<WindowKeyHead>();
  if (!reader.finished() || head.rail >= rails_.size()) return false;
  // Bound on a sink that was replaced since: another key follows.
  if (head.epoch != rails_[head.rail].push->peer_epoch) return true;
  std::lock_guard lock(mutex_);
  const auto it = windows_.find(head.window);
  if (it == windows_.end()) return true;  // we have given up pushing
  PushWindow& window = *it->second;
  window.keys[head.rail] = head.key;
  window.has_key[head.rail] = true;
  open_if_ready(window);
  return true;
}

bool Outgoing::on_no_window(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<NoWindowHead>();
  const ByteView view = reader.take(reader.remaining());
  if (!reader.ok()) return false;
  const std::string text(reinterpret_cast<const char*>(view.data()), view.size());
  std::deque<RequestPtr> refused;
  Failure failure;
  {
    std::lock_guard lock(mutex_);
    const auto it = windows_.find(head.window);
    if (it == windows_.end()) return true;
    const std::shared_ptr<PushWindow> window = it->second;
    if (head.code == 0) {
      window->state = PushWindow::State::kRefused;
      if (head.never != 0)
        no_push_ = cat("it gives no windows: ", text);
      else
        refusal_ = text;
      release_waiting(*window);
      return true;
    }
    // The owner's verdict on the lease holds for what waited.
    if (window->state != PushWindow::State::kAsked) return false;
    windows_.erase(it);
    failure.code = head.code <= kMaxCode ? static_cast<Code>(head.code) : Code::kInternal;
    failure.err = head.err;
    failure.text = text;
    for (const Ticket& ticket : std::exchange(window->waiting, {})) {
      refused.push_back(flights_[ticket.slot].request);
      --flights_[ticket.slot].generation;
      flights_.release(ticket.slot);
    }
  }
  for (const RequestPtr& request : refused)
    host_.ended(connection_, request, {.ok = false, .failure = failure});
  return true;
}

bool Outgoing::on_revoke(ByteView body) {
  Reader reader(body);
  const auto lease = reader.get<WindowId>();
  if (!reader.finished()) return false;
  std::lock_guard lock(mutex_);
  const auto it = windows_.find(lease);
  if (it != windows_.end()) {
    const std::shared_ptr<PushWindow> window = it->second;
    windows_.erase(it);
    window->state = PushWindow::State::kRevoked;
    release_waiting(*window);  // to hear from the owner why not
    if (window->num_inside > 0) return true;
  }
  channel_.message(Type::kDrained, {view_of(lease)});
  return true;
}

void Outgoing::forget_keys(const Rail& rail) {
  std::lock_guard lock(mutex_);
  for (const auto& [lease, window] : windows_) window->has_key[rail.number] = false;
}

void Outgoing::give_up_pushing(const Failure& why) {
  std::lock_guard lock(mutex_);
  no_push_ = why.text;
  for (const auto& [lease, window] : std::exchange(windows_, {})) {
    window->state = PushWindow::State::kRefused;
    release_waiting(*window);
  }
  for (uint32_t slot = 0; slot < kNumSlots; ++slot) {
    Flight& flight = flights_[slot];
    if (flight.request && flight.window && !flight.is_dead() && !flight.answered)
      kill({slot, flight.generation}, flight, why);
  }
}

std::string Outgoing::push_text() const {
  std::lock_guard lock(mutex_);
  if (!push_) return "pulled by the peer";
  if (!no_push_.empty()) return cat("pulled by the peer: ", no_push_);
  return cat("pushed where they have a lease, of which ", windows_.size(),
             " are known; else pulled by the peer",
             refusal_.empty() ? "" : cat("; so was one lease's at least: ", refusal_));
}

// ---------------------------------------------------------------- chains

void Outgoing::cut_push(const Request& request, Flight& flight, Chunk& chunk) {
  while (flight.moved < request.nbytes) {
    const Span& span = request.spans[flight.next_span];
    const RegionMemory::Run run =
        flight.memory->at(span.local + flight.next_offset, span.nbytes - flight.next_offset);
    const uint64_t to =
        flight.window->address + (span.remote + flight.next_offset - flight.window->offset);
    const uint32_t n = chunk.add(to, kNoKeys, run.base, run.registration->lkeys(), run.nbytes,
                                 rails_.max_sge());
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
        rail = rails_.pick_push(flight->memory->node(), *flight->window);
        if (rail == nullptr) continue;
      }
      pushing_.erase(it);
      if (flight != nullptr) flight->queued = false;
      if (!wanted) return true;
      chunk = rails_.new_chunk();
      chunk->ticket = ticket;
      chunk->window = flight->window;
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
      if (wanted) rail = rails_.pick_push(flight.memory->node(), *flight.window);
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
      const bool wanted = !flight.is_dead() && !flight.answered &&
                          flight.window->state == PushWindow::State::kOpen;
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
