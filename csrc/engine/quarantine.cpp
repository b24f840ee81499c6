// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory of transfers and leases that have ended but are not quiet yet: counted
// for stats(), and refused to a new lease, since what still lands there would
// spoil it. It clears by itself.
#include <algorithm>

#include "engine/engine.hpp"

namespace kvxfer {
namespace {

uint64_t size_of(const std::vector<Extent>& extents) {
  uint64_t out = 0;
  for (const Extent& each : extents) out += each.end - each.begin;
  return out;
}

// Both are sorted and without overlaps.
const Extent* meeting(const std::vector<Extent>& a, const std::vector<Extent>& b) {
  for (auto i = a.begin(), j = b.begin(); i != a.end() && j != b.end();) {
    if (i->begin < j->end && j->begin < i->end) return &*i;
    i->end <= j->end ? void(++i) : void(++j);
  }
  return nullptr;
}

// Who waited for quiet may ask before the entry is gone. An entry leaves while its lease or
// transfer is alive, so under the lock the pointer is good.
bool is_quiet(const void* who, bool is_lease) {
  return is_lease ? static_cast<const EngineLease*>(who)->gate.quiet()
                  : static_cast<const Transfer*>(who)->quiesced.load(std::memory_order_acquire);
}

}  // namespace

void Engine::enter_quarantine(const Transfer& t) {
  if (!t.local) return;
  std::vector<Extent> extents;
  for (const Span& span : t.spans) extents.push_back({span.local, span.local + span.nbytes});
  extents = merged(std::move(extents));
  std::lock_guard lock(quarantine_mutex_);
  if (t.quiesced.load(std::memory_order_acquire)) return;  // between the cancel and here
  const uint64_t nbytes = size_of(extents);
  quarantine_[&t] = {t.local, std::move(extents), nbytes, now_ns(), false};
}

void Engine::enter_quarantine(const LeasePtr& lease) {
  std::lock_guard lock(quarantine_mutex_);
  if (lease->gate.quiet()) return;
  quarantine_[lease.get()] = {lease->region, lease->extents, size_of(lease->extents), now_ns(),
                              true};
}

void Engine::leave_quarantine(const void* who) noexcept {
  std::shared_ptr<Region> last;  // dropped after the lock
  std::lock_guard lock(quarantine_mutex_);
  if (auto it = quarantine_.find(who); it != quarantine_.end()) {
    last = std::move(it->second.region);
    quarantine_.erase(it);
  }
}

void Engine::check_quarantine(const Region& region, const std::vector<Extent>& extents) const {
  std::lock_guard lock(quarantine_mutex_);
  for (const auto& [who, entry] : quarantine_) {
    if (entry.region.get() != &region || is_quiet(who, entry.is_lease)) continue;
    if (const Extent* where = meeting(extents, entry.extents))
      fail(Code::kInvalidArgument, "bytes ", where->begin, " to ", where->end, " of region '",
           region.name, "' are quarantined: ",
           entry.is_lease ? "a lease on them was revoked and is not quiet"
                          : "a transfer on them has ended and is not quiesced",
           " yet; wait for ", entry.is_lease ? "lease.quiet" : "xfer.quiesced");
  }
}

void Engine::fill_quarantine(EngineStats& out) const {
  std::lock_guard lock(quarantine_mutex_);
  const int64_t now = now_ns();
  for (const auto& [who, entry] : quarantine_) {
    if (is_quiet(who, entry.is_lease)) continue;
    if (!entry.is_lease) ++out.unquiesced;
    out.quarantined_nbytes += entry.nbytes;
    out.quarantined_age_s =
        std::max(out.quarantined_age_s, static_cast<double>(now - entry.since_ns) * 1e-9);
  }
}

}  // namespace kvxfer
