// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The control segment of one connection: for each side what it sends, and the slots of its own
// requests.
//
// The *messages* ring has request heads and outcomes, all short; the *bulk* ring has what may be
// long, in order, so that a small message never waits behind it. Bytes of memory that cannot be
// mapped pass through the sender's *staging* segment (its own, sealed, mapped read-only by the
// receiver), slot after slot.
#pragma once

#include <atomic>
#include <cstdint>

#include "transport/shm/ring.hpp"

namespace kvxfer::shm {

inline constexpr uint32_t kVersion = 2;
inline constexpr uint64_t kMessageRingBytes =
    256 * 1024;  // a 48 KiB notification fits several times
inline constexpr uint64_t kBulkRingBytes = 64 * 1024;
inline constexpr uint32_t kNumSlots = 1024;  // requests in flight, per direction
inline constexpr uint32_t kStageSlotBytes = 64 * 1024;
inline constexpr uint32_t kNumStageSlots = 32;  // 2 MiB: stays in a core's cache
inline constexpr uint64_t kStageBytes = uint64_t{kStageSlotBytes} * kNumStageSlots;
inline constexpr uint32_t kMaxSpansPerRecord = 1024;
inline constexpr size_t kMaxReadSpans =
    4 * kMaxSpansPerRecord;  // of one staged read, not yet served
inline constexpr size_t kMaxQueued =
    8 * kNumSlots;  // messages that wait for room in the ring  // 24 KiB

// What the two sides agree on about a request. Both write it, by CAS from kPosted, so that exactly
// one of "accepted" and "cancelled" happened, also when either side stops or dies in between:
//   POSTED --owner--> ACCEPTED | REFUSED        POSTED --initiator--> CANCELLED
// The owner's CAS publishes the bytes; the initiator's orders its reuse of the source after the
// refusal.
enum class Slot : uint32_t { kFree = 0, kPosted = 1, kAccepted = 2, kRefused = 3, kCancelled = 4 };
constexpr uint64_t slot_word(uint32_t generation, Slot state) {
  return (uint64_t{generation} << 32) | static_cast<uint32_t>(state);
}

struct Side {
  RingHead messages, bulk;
  // The other side writes: how many staging slots it has given back. Release of its loads from
  // them.
  alignas(128) std::atomic<uint64_t> stage_head;
  alignas(128) std::atomic<uint64_t> slots[kNumSlots];
  alignas(128) std::byte message_data[kMessageRingBytes];
  alignas(128) std::byte bulk_data[kBulkRingBytes];
};

// [0] is the side that connected, [1] the one that accepted. A new memfd is all zeros, which is the
// empty state of everything here.
struct Control {
  Side side[2];
};

enum class Type : uint32_t {
  kRequest = 1,   // message: RequestHead, notification, spans where they are inline
  kOutcome = 2,   // message of the owner: how a request ended
  kReadPart = 3,  // message: the next spans of a read
  kAbort = 4,     // message: nothing more comes for this cancelled request
  kSpans = 5,     // bulk: the next spans of a write that has too many for its head
  kStaged = 6,    // bulk: a staging slot with the bytes for the next spans
  kReadData = 7,  // bulk of the owner: a staging slot with the next bytes of a read
  kGranted = 8,   // message of the owner: so many spans of a read may be pulled by the reader
  kReadDone = 9,  // message: all of a granted read was pulled, and nothing had been revoked
  kCheck = 10,    // bulk: spans that will come in kSpans; the owner judges all before it copies any
};

}  // namespace kvxfer::shm
