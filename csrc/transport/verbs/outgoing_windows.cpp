// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The windows that our own writes are pushed through, as the writer sees them: asked for once a
// lease, told of, revoked, drained.
#include <algorithm>
#include <utility>

#include "common/error.hpp"
#include "common/peer_text.hpp"
#include "transport/verbs/outgoing.hpp"

namespace kvxfer::verbs {
namespace {
constexpr size_t kMaxKnown = 4096;  // leases of which we remember that their writes are pulled
}

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

// Whether the lease allows all of it, as the owner has told its spans and arrivals, and its chains
// can be numbered. What does not is pulled: then the owner says what is wrong with it.
bool Outgoing::fits(const Request& request, const RegionMemory& memory,
                    const PushWindow& window) const {
  if (request.has_arrival && request.arrival >= window.num_arrivals) return false;
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
    window.num_arrivals = head.num_arrivals;
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
  const std::string text = peer_text({reinterpret_cast<const char*>(view.data()), view.size()});
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

}  // namespace kvxfer::verbs
