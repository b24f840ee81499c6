// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Places where a test may park a thread, the windows that random stops almost never hit; and a
// clock that a test may put forward. Built in by KVXFER_TEST_HOOKS (the C++ tests); nothing
// otherwise.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvxfer::hooks {

enum class Point : uint8_t {
  kInsideChunk,   // the owner's copier, inside the gates, its stores yet to come
  kInsideRead,    // the initiator's copier of a read, its stores yet to come
  kBeforeAccept,  // all bytes have landed; inside the gates, nothing agreed yet
  kAfterAccept,   // agreed; inside the gates, arrival and notification not yet visible
};

#ifdef KVXFER_TEST_HOOKS
// Written by the test, read by copiers; acquire, so that they see what the handler uses.
inline std::atomic<void (*)(Point)> handler{nullptr};
inline void reached(Point point) noexcept {
  if (auto* run = handler.load(std::memory_order_acquire)) run(point);
}
// Time that a test has let pass without waiting for it. Relaxed: who looks at the clock earlier saw
// an earlier time.
inline std::atomic<int64_t> skipped_ns{0};
inline int64_t skipped() noexcept { return skipped_ns.load(std::memory_order_relaxed); }
#else
inline void reached(Point) noexcept {}
constexpr int64_t skipped() noexcept { return 0; }
#endif

}  // namespace kvxfer::hooks
