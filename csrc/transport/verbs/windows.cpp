// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/windows.hpp"

#include <algorithm>
#include <span>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {
constexpr size_t kMaxWindows = 1024;  // of one connection
// In a row: each costs a queue pair, and who has so many will have more.
constexpr uint32_t kMaxFailedBinds = 4;
using BoundState = Window::Bound::State;
}  // namespace

// ---------------------------------------------------------------- from the question to the keys

void Windows::refuse(const NoWindowHead& head, const std::string& text) {
  constexpr size_t kMaxText = 256;
  channel_.message(Type::kNoWindow,
                   {view_of(head), as_bytes_view(std::string_view(text).substr(0, kMaxText))});
}

// Why there is no window for this lease, whose writes can be pulled all the same.
std::optional<std::string> Windows::refusal(const Lease& lease, Window& window) const {
  if (windows_.size() >= kMaxWindows) return cat(kMaxWindows, " windows are in use");
  if (lease.extents.size() > kMaxLeaseExtents)
    return cat("the lease has ", lease.extents.size(), " spans, more than ", kMaxLeaseExtents);
  window.memory = memory_.find(lease.region->id);
  if (!window.memory) return "its region is not registered with an RDMA device";
  if (!window.memory->readable()) return "its region has share=\"never\"";
  window.offset = lease.extents.front().begin;
  window.nbytes = lease.extents.back().end - window.offset;
  window.hull = window.memory->hull(window.offset, window.nbytes);
  if (window.hull.registration == nullptr)
    return "from its first span to its last there are several pieces of memory";
  return {};
}

bool Windows::on_ask(ByteView body, const std::string& why_not) {
  Reader reader(body);
  const auto head = reader.get<AskWindowHead>();
  if (!reader.finished() || head.lease.id == 0) return false;
  const uint64_t lease = head.lease.id;
  auto window = std::make_shared<Window>();
  window->lease = lease;
  Landing& landing = window->landing;
  if (auto failure = host_.admit(connection_, {Op::kWrite, head.region, head.lease, {}}, landing)) {
    connection_.counters.refused.fetch_add(1, std::memory_order_relaxed);
    refuse({lease, static_cast<uint32_t>(failure->code), failure->err}, failure->text);
    return true;
  }
  if (windows_.contains(lease)) return false;  // it was told
  if (!why_not.empty() || num_failed_ > kMaxFailedBinds) {
    refuse({.window = lease, .never = 1},
           why_not.empty() ? cat(num_failed_, " binds have failed one after the other") : why_not);
    return true;
  }
  if (auto why = refusal(*landing.lease, *window)) {
    refuse({.window = lease}, *why);
    return true;
  }
  if (!landing.enter()) {
    const Failure closed = landing.closed();
    refuse({lease, static_cast<uint32_t>(closed.code), closed.err}, closed.text);
    return true;
  }
  windows_.emplace(lease, window);
  count();
  tell(*window);
  for (const auto& rail : rails_)
    if (rail->push->sink.is_connected()) bind(window, *rail);
  // Where no sink is connected yet, its keys follow.
  return true;
}

// The hull, and the spans of the lease, which the writer keeps to.
void Windows::tell(const Window& window) {
  const std::span<const Extent> extents(window.landing.lease->extents);
  for (size_t at = 0; at < extents.size();) {
    const auto part = extents.subspan(at, std::min<size_t>(extents.size() - at, kMaxExtents));
    at += part.size();
    const WindowHead head{window.lease,
                          reinterpret_cast<uint64_t>(window.hull.base),
                          window.offset,
                          window.nbytes,
                          window.landing.lease->num_arrivals,
                          static_cast<uint32_t>(part.size()),
                          static_cast<uint32_t>(extents.size())};
    channel_.message(Type::kWindow, {view_of(head), view_of(part)});
  }
}

void Windows::bind(const WindowPtr& window, Rail& rail) {
  Window::Bound& bound = window->bound[rail.number];
  if (bound.failed || bound.state != BoundState::kNot || window->state != Window::State::kOpen)
    return;
  if (window->hull.registration->on(*rail.device) == nullptr)
    window->why = cat(rail.device->name(), " was lost when the region was registered");
  else if (!window->hull.registration->takes_windows(*rail.device))
    window->why = cat(rail.device->name(), " binds no windows to a GPU's memory by dma-buf");
  else if (rail.push->sink.bind(window, window->why))
    return;
  bound.failed = true;
  give_up_if_unbound(window);
}

// It is bound nowhere, and nowhere will be: the writer must know.
void Windows::give_up_if_unbound(const WindowPtr& window) {
  const bool any_left = std::ranges::any_of(rails_, [&](const auto& rail) {
    const Window::Bound& bound = window->bound[rail->number];
    return bound.is_open() || !bound.failed;
  });
  if (any_left || window->state != Window::State::kOpen) return;
  stopped_(*window->landing.lease, {.code = Code::kTransport,
                                    .text = cat("the window of the lease is gone: ", window->why)});
  refuse({.window = window->lease}, window->why);
  leave(*window);
  windows_.erase(window->lease);
  count();
}

void Windows::bind_all(Rail& rail) {
  scratch_.clear();
  for (const auto& [lease, window] : windows_) scratch_.push_back(window);
  for (const WindowPtr& window : scratch_) bind(window, rail);
  scratch_.clear();
}

bool Windows::on_op(Rail& rail, const ibv_wc& completion) {
  const auto op = rail.push->sink.on_op(completion);
  if (!op) return true;
  const WindowPtr& window = op->window;
  Window::Bound& bound = window->bound[rail.number];
  const bool ok = completion.status == IBV_WC_SUCCESS;
  if (op->is_bind) {
    if (!ok) {
      // A flush is another's fault: it is bound again on the next sink.
      if (completion.status != IBV_WC_WR_FLUSH_ERR) {
        ++num_failed_;
        bound.failed = true;
        window->why = cat("binding a memory window on ", rail.device->name(),
                          " failed: ", api().wc_status_str(completion.status));
      }
      return false;  // what is left of it goes with the sink
    }
    num_failed_ = 0;
    if (bound.state == BoundState::kBinding) {
      bound.state = BoundState::kBound;
      if (window->state == Window::State::kOpen)
        channel_.message(Type::kWindowKey,
                         {view_of(WindowKeyHead{window->lease, static_cast<uint32_t>(rail.number),
                                                rail.push->epoch, bound.key, 0})});
    }
    return true;
  }
  if (!ok) return false;
  bound.state = BoundState::kInvalid;
  if (settle(window)) {
    windows_.erase(window->lease);
    count();
  }
  return true;
}

// ---------------------------------------------------------------- and back

bool Windows::is_open(uint64_t lease) const {
  const auto it = windows_.find(lease);
  return it != windows_.end() && it->second->state == Window::State::kOpen;
}

// Nothing of the owner's is held any more, though the peer may never say that it has drained.
void Windows::leave(Window& window) {
  window.state = Window::State::kSpent;
  window.memory.reset();
  window.hull = {};
  Landing landing = std::move(window.landing);
  window.landing = {};
  landing.leave();
}

void Windows::ask(Window& window) {
  window.state = Window::State::kAsked;
  window.since_ns = now_ns();
  channel_.message(Type::kRevoke, {view_of(window.lease)});
  stopped_(*window.landing.lease, window.landing.closed());
}

// Invalidates it, with or without the peer.
void Windows::close(const WindowPtr& window) {
  window->state = Window::State::kClosing;
  window->since_ns = now_ns();
  for (const auto& rail : rails_) {
    Window::Bound& bound = window->bound[rail->number];
    if (bound.is_open()) rail->push->sink.invalidate(window);
  }
}

// The gates are left when it is bound nowhere any more; its keys are free when the peer has drained
// as well, since their 8 bits come again.
bool Windows::settle(const WindowPtr& window) {
  const bool bound =
      std::ranges::any_of(window->bound, [](const Window::Bound& each) { return each.is_open(); });
  if (window->state == Window::State::kClosing && !bound) leave(*window);
  if (window->state != Window::State::kSpent) return false;
  bool kept = false;
  for (const auto& rail : rails_) {
    MwPtr& mw = window->bound[rail->number].mw;
    if (mw && window->drained) rail->push->sink.give_back(std::move(mw));
    kept |= mw != nullptr;
  }
  return !kept;
}

void Windows::settle() {
  scratch_.clear();
  for (const auto& [lease, window] : windows_) scratch_.push_back(window);
  for (const WindowPtr& window : scratch_)
    if (settle(window))
      windows_.erase(window->lease);
    else if (window->state == Window::State::kOpen)
      give_up_if_unbound(window);
  scratch_.clear();
  count();
}

bool Windows::on_drained(ByteView body) {
  Reader reader(body);
  const auto lease = reader.get<WindowId>();
  if (!reader.finished()) return false;
  const auto it = windows_.find(lease);
  if (it == windows_.end()) return true;  // its keys went with their sinks meanwhile
  const WindowPtr window = it->second;
  if (window->state == Window::State::kOpen) return false;
  window->drained = true;
  if (window->state == Window::State::kAsked) close(window);
  if (settle(window)) {
    windows_.erase(window->lease);
    count();
  }
  return true;
}

void Windows::free_all(Rail& rail) {
  for (const auto& [lease, window] : windows_) {
    Window::Bound& bound = window->bound[rail.number];
    bound.mw.reset();
    bound.state = BoundState::kNot;
  }
}

void Windows::look_at_gates() {
  for (const auto& [lease, window] : windows_) {
    const Landing& landing = window->landing;
    if (window->state == Window::State::kOpen &&
        (landing.lease->gate.closed() || landing.region->gate.closed()))
      ask(*window);
  }
}

int64_t Windows::check(int64_t now_ns, const std::function<void(Rail&)>& stuck) {
  int64_t next_ns = kNever;
  std::array<bool, kMaxRails> is_stuck{};
  scratch_.clear();
  for (const auto& [lease, window] : windows_) scratch_.push_back(window);
  for (const WindowPtr& window : scratch_) {
    if (window->state != Window::State::kAsked && window->state != Window::State::kClosing)
      continue;
    if (now_ns - window->since_ns < kPatienceNs) {
      next_ns = std::min(next_ns, window->since_ns + kPatienceNs);
    } else if (window->state == Window::State::kAsked) {
      close(window);
      next_ns = std::min(next_ns, window->since_ns + kPatienceNs);
      if (settle(window)) windows_.erase(window->lease);  // it was bound nowhere
    } else {
      for (const auto& rail : rails_)
        is_stuck[rail->number] |= window->bound[rail->number].is_open();
    }
  }
  scratch_.clear();
  count();
  for (const auto& rail : rails_)
    if (is_stuck[rail->number]) stuck(*rail);
  return next_ns;
}

void Windows::clear() {
  for (const auto& [lease, window] : windows_) {
    for (Window::Bound& bound : window->bound) bound.mw.reset();
    if (window->state != Window::State::kSpent) leave(*window);
  }
  windows_.clear();
  count();
}

}  // namespace kvxfer::verbs
