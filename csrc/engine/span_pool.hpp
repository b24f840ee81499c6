// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Span lists of large requests, kept for the next one: memory that comes from the system and goes
// back there with every request costs a page fault per 170 spans, more than all else about them.
#pragma once

#include <array>
#include <cstddef>
#include <mutex>
#include <vector>

#include "transport/transport.hpp"

namespace kvxfer {

class SpanPool {
 public:
  // Of the process. Any thread; never waits: who finds it in use goes to the allocator, as does a
  // forked child in which a thread that is not there has it for ever.
  static SpanPool& shared() noexcept;

  // Empty, or one with room for `most` and any contents.
  std::vector<Span> take(size_t most) noexcept;
  void give(std::vector<Span> spans) noexcept;

  static constexpr size_t kLeast = 2048;  // the allocator keeps what is smaller itself
  static constexpr size_t kMostLists = 16;
  static constexpr size_t kMostSpans = size_t{1} << 19;  // in all: 12 MiB

 private:
  std::mutex mutex_;
  std::array<std::vector<Span>, kMostLists> lists_;  // those without capacity are free places
  size_t num_spans_ = 0;                             // the sum of their capacities
};

}  // namespace kvxfer
