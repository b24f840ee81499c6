// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The writer's side of a window: what it may post, and where. Outgoing has one for each lease under
// which it was asked to write.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "transport/records.hpp"
#include "transport/region.hpp"
#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

// Under Outgoing's mutex; `keys` are the progress thread's alone.
struct PushWindow {
  enum class State : uint8_t {
    kAsked,    // requests under it wait
    kOpen,     // it has been bound on a rail at least, and the lease's spans are known
    kRefused,  // they are pulled
    kRevoked,  // nothing more is posted; the owner waits for what was
  };
  uint64_t lease = 0;
  State state = State::kAsked;
  uint64_t address = 0, offset = 0, nbytes = 0;  // of the hull: over there, in the region, how long
  std::vector<Extent> extents;                   // of the lease, sorted
  uint64_t num_extents = 0;                      // that it has in all; 0: not known yet
  uint64_t num_arrivals = 0;                     // of the lease
  std::array<bool, kMaxRails> has_key{};
  Keys keys{};
  uint32_t num_inside = 0;     // chains that are posted, in doubt, or to be posted again
  std::deque<Ticket> waiting;  // requests that wait for the answer

  bool any_key() const noexcept { return std::ranges::find(has_key, true) != has_key.end(); }
  bool covers(uint64_t at, uint64_t size) const noexcept {
    auto after = std::ranges::upper_bound(extents, at, {}, &Extent::begin);
    if (after == extents.begin()) return false;
    const Extent& extent = *--after;
    return at <= extent.end && size <= extent.end - at;
  }
};

}  // namespace kvxfer::verbs
