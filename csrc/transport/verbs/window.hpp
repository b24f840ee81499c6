// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's side of a window: what lets a peer's NIC write under one lease. It is bound on the
// sink of each rail, and its gates are entered from before the first bind until nothing that comes
// can be written through it any more.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "transport/transport.hpp"
#include "transport/verbs/memory.hpp"

namespace kvxfer::verbs {

struct WindowCloser {
  void operator()(ibv_mw* window) const noexcept {
    if (birth.here()) (void)ibv_dealloc_mw(window);  // an error means a leak: nobody to tell
  }
  Birth birth;
};
using MwPtr = std::unique_ptr<ibv_mw, WindowCloser>;

struct Window {
  enum class State : uint8_t {
    kOpen,
    kAsked,    // the gate is closed, the peer was asked to drain
    kClosing,  // it is being invalidated
    kSpent,    // nobody writes through it; the peer has not said that it has drained
  };
  uint64_t lease = 0;
  Landing landing;  // entered until it is spent
  RegionMemoryPtr memory;
  RegionMemory::Hull hull;
  uint64_t offset = 0, nbytes = 0;  // of the hull in its region
  State state = State::kOpen;
  bool drained = false;  // the peer has said so
  int64_t since_ns = 0;  // in this state

  struct Bound {
    enum class State : uint8_t { kNot, kBinding, kBound, kInvalidating, kInvalid };
    State state = State::kNot;
    bool failed = false;  // it could not be bound there, and is not again
    MwPtr mw;
    uint32_t key = 0;
    bool is_open() const noexcept { return state != State::kNot && state != State::kInvalid; }
  };
  std::array<Bound, kMaxRails> bound;
  std::string why;  // the last of those failed
};
using WindowPtr = std::shared_ptr<Window>;

}  // namespace kvxfer::verbs
