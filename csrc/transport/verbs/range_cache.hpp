// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Registrations that regions of one engine share, by range.
//
// A key opens all of its registration, and for as long as that lives. So a region shares one only
// with regions of exactly its range and rights, of which none makes a secret that another does not:
// those that every authenticated peer may read without a lease, or those that no peer may read.
//
// And only with regions that are registered *now*. Once a region was deregistered its memory is the
// user's, to be unmapped, remapped or dropped (MADV_DONTNEED), and a registration that some peer's
// READ still needs holds the pages of before: whoever was given it would move bytes that nobody can
// see any more.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

using RegistrationPtr = std::shared_ptr<const Registration>;

struct Range {
  const std::byte* base = nullptr;
  uint64_t nbytes = 0;
  int access = 0;
  auto operator<=>(const Range&) const = default;
};

// Any thread.
class RangeCache {
 public:
  // For one region more; null: there is none.
  RegistrationPtr take(const Range& range) {
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(range);
    if (it == entries_.end()) return nullptr;
    ++it->second.num_regions;
    return it->second.registration;
  }
  // A region has made one. Two that made theirs at once keep both, and share the first.
  void put(const Range& range, const RegistrationPtr& registration) {
    std::lock_guard lock(mutex_);
    entries_.try_emplace(range, Entry{registration, 1});
  }
  // A region that took or made this one leaves it.
  void leave(const Range& range, const RegistrationPtr& registration) noexcept {
    RegistrationPtr last;  // deregistered after the lock, and by whoever needs it last
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(range);
    if (it == entries_.end() || it->second.registration != registration) return;
    if (--it->second.num_regions > 0) return;
    last = std::move(it->second.registration);
    entries_.erase(it);
  }

 private:
  struct Entry {
    RegistrationPtr registration;
    uint64_t num_regions = 0;
  };
  std::mutex mutex_;  // not held while memory is registered
  std::map<Range, Entry> entries_;
};

}  // namespace kvxfer::verbs
