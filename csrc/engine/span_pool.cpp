// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/span_pool.hpp"

#include <algorithm>
#include <utility>

namespace kvxfer {

SpanPool& SpanPool::shared() noexcept {
  // Never destroyed: the last transfer may go after the statics.
  static auto* pool = new SpanPool;
  return *pool;
}

std::vector<Span> SpanPool::take(size_t most) noexcept {
  if (most < kLeast) return {};
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return {};
  std::vector<Span>* best = nullptr;
  for (auto& each : lists_)
    if (each.capacity() >= most && (best == nullptr || each.capacity() < best->capacity()))
      best = &each;
  if (best == nullptr) return {};
  num_spans_ -= best->capacity();
  return std::exchange(*best, {});
}

// In a free place, or in that of the smallest, which `spans` then frees.
void SpanPool::give(std::vector<Span> spans) noexcept {
  const size_t room = spans.capacity();
  if (room < kLeast) return;
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  auto& place = *std::ranges::min_element(lists_, {}, &std::vector<Span>::capacity);
  if (place.capacity() >= room || num_spans_ - place.capacity() + room > kMostSpans) return;
  num_spans_ += room - place.capacity();
  place.swap(spans);
}

}  // namespace kvxfer
