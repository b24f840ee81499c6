// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What two engines say to each other over the control queue pair, beside what transport/records.hpp
// has; docs/wire_format.md lists it. OutcomeHead::span is a segment's number within the request.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "transport/records.hpp"
#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

inline constexpr uint32_t kVersion = 5;
inline constexpr uint32_t kNumSlots = kMaxInFlight;   // of requests, per direction
inline constexpr uint32_t kMaxSegments = 1024;        // per message
inline constexpr uint32_t kMaxDataBytes = 32 * 1024;  // of memory, in one message
inline constexpr uint32_t kMaxMessageBytes = 96 * 1024;
inline constexpr uint32_t kMaxKeyRows = 256;   // per message
inline constexpr uint32_t kMaxExtents = 4096;  // per message
// Of a lease whose writes are pushed: the writer keeps them all.
inline constexpr uint64_t kMaxLeaseExtents = 65536;

enum class Type : uint32_t {
  kCredit = 1,       // nothing but what every message carries: how many receives are posted
  kRequest = 2,      // RequestHead, notification, key rows, first segments
  kPart = 3,         // ListHead, key rows, the next segments
  kMore = 4,         // PartHead of the owner: send the next segments of your request
  kOutcome = 5,      // OutcomeHead of the owner, text: how a request ended
  kAbort = 6,        // PartHead: the request was cancelled, or a granted read has failed
  kGranted = 7,      // GrantHead of the owner, key rows, sources: the reader may pull these
  kReadDone = 8,     // PartHead: all of a granted read was pulled, and nothing had been revoked
  kWriteData = 9,    // DataHead, bytes: the next of a write from memory that no peer may read
  kReadData = 10,    // DataHead of the owner, bytes: the next of a read of such memory
  kPullBroken = 11,  // QpHead: my queue pair that reads your memory has failed; make another source
  kNewSource = 12,   // QpHead: my memory is read through this queue pair from now on, or not at all
  kNewPuller = 13,   // QpHead: and this one reads it
  kSourceReady = 14,  // QpHead: it is connected
  kUseMessages = 15,  // PartHead of the owner: send the bytes of your write, I cannot pull them
  // Pushed writes.
  kAskWindow = 16,   // AskWindowHead: a window for the writes of this lease
  kWindow = 17,      // WindowHead of the owner, extents: what it covers, and the lease's spans
  kWindowKey = 18,   // WindowKeyHead of the owner: its key on a rail
  kNoWindow = 19,    // NoWindowHead of the owner, text: there is none, or no longer
  kRevoke = 20,      // WindowId of the owner: post nothing more through it
  kDrained = 21,     // WindowId: nothing of mine goes through it any more
  kPushBroken = 22,  // QpHead: my queue pair that writes your memory has failed; replace its sink
  kNewSink = 23,     // QpHead of the owner: writes come in by this one, or not at all (number 0)
  kNewPusher = 24,   // QpHead, immediates (u32): this one writes; of these I do not know
  kSinkReady = 25,   // SinkHead of the owner, immediates (u32): of these I have the bytes
  kPushCredit = 26,  // SinkHead of the owner: how many receives it has posted
  // Queue pairs of messages.
  kResume = 27,      // the head alone, not a fragment: I carry on over this queue pair
  kNewControl = 28,  // QpHead: and on this rail this one stands by from now on
};

enum Flag : uint32_t {
  kHasNotify = 1,
  kHasArrival = 2,
  kStaged = 4,  // a write: its bytes come in messages; a read: they must, it cannot be pulled
  kPushed = 8,  // a write: its bytes come through the window of its lease
  kOnGpu = 16,  // the initiator's memory is a GPU's: its bytes cannot go in messages
};

struct RequestHead {
  Ticket ticket;
  uint32_t op = 0;
  uint32_t flags = 0;
  uint32_t notify_nbytes = 0;
  uint32_t num_segments = 0;  // that follow in this message
  uint32_t num_rows = 0;      // likewise
  uint32_t reserved = 0;
  uint64_t nbytes = 0;  // of the whole request
  RegionRef region;
  LeaseRef lease;
  uint64_t arrival = 0;
};

// Where the bytes are in the initiator's memory (a pulled write; else zeros), and which of the
// owner's region they belong to.
struct Segment {
  uint64_t address = 0, target = 0;
  uint32_t nbytes = 0;
  uint32_t row = 0;  // of the message's keys
};

struct ListHead {
  Ticket ticket;
  uint32_t num_segments = 0, num_rows = 0;
};

// Where a reader finds the word of a gate, and what stands there while it is open. Their keys are
// the first row.
struct WordSpot {
  uint64_t address = 0, value = 0;
  uint64_t present = 0;
};

struct Source {
  uint64_t address = 0;
  uint32_t nbytes = 0;
  uint32_t row = 0;
};

struct GrantHead {
  Ticket ticket;
  uint32_t num_sources = 0, num_rows = 0;
  WordSpot region, lease;
};

struct DataHead {
  Ticket ticket;
  uint32_t nbytes = 0;
  uint32_t reserved = 0;
};

struct QpHead {
  uint32_t rail = 0;
  uint32_t epoch = 0;
  uint32_t number = 0, psn = 0;  // kNewSource: number 0, there is none for now
};

struct AskWindowHead {
  RegionRef region;
  LeaseRef lease;
};

using WindowId = uint64_t;  // the lease's: there is one for each lease of a connection

struct WindowHead {
  WindowId window = 0;
  uint64_t address = 0, offset = 0, nbytes = 0;  // of the hull: here, in the region, how long
  uint64_t num_arrivals = 0;                     // of the lease
  uint32_t num_extents = 0;                      // that follow in this message
  uint32_t total_extents = 0;
};

struct WindowKeyHead {
  WindowId window = 0;
  uint32_t rail = 0, epoch = 0;  // of the sink that it is bound on
  uint32_t key = 0;
  uint32_t reserved = 0;
};

struct NoWindowHead {
  WindowId window = 0;
  uint32_t code = 0;  // of the owner's verdict on its writes; 0: they can be pulled
  int32_t err = 0;
  uint32_t never = 0;  // no lease of this connection has one
  uint32_t reserved = 0;
};

struct SinkHead {
  uint32_t rail = 0, epoch = 0;
  uint32_t ready = 0;   // 0: there is no queue pair
  uint32_t posted = 0;  // receives, since that sink was made
};

// What a chain's last WRITE tells: slot (10 bits) | generation (7) | whether it is the request's
// last chain (1) | chain (14).
inline constexpr uint32_t kMaxChains = 1u << 14;
struct Immediate {
  uint32_t slot = 0, generation = 0, chain = 0;
  bool last = false;

  static constexpr uint32_t kGenerations = 128;
  static_assert(kNumSlots <= 1024);
  uint32_t pack() const noexcept {
    return slot << 22 | (generation % kGenerations) << 15 | (last ? 1u << 14 : 0) | chain;
  }
  static Immediate unpack(uint32_t bits) noexcept {
    return {bits >> 22, bits >> 15 & (kGenerations - 1), bits & (kMaxChains - 1),
            (bits >> 14 & 1) != 0};
  }
};

// The u32 that are the rest of a message, at most so many.
inline bool read_numbers(Reader& reader, size_t most, std::vector<uint32_t>& out) {
  const size_t count = reader.remaining() / sizeof(uint32_t);
  if (count > most || reader.remaining() % sizeof(uint32_t) != 0) return false;
  out.clear();
  for (size_t i = 0; i < count; ++i) out.push_back(reader.u32());
  return reader.finished();
}

// Key rows: for each piece of registered memory that a message names, its key on every rail of the
// connection (u32), in their order.
using KeyRows = std::vector<Keys>;
using KeyRowsPtr = std::shared_ptr<const KeyRows>;
// `out`: null where there are none.
inline bool read_rows(Reader& reader, uint32_t num_rows, size_t num_rails, KeyRowsPtr& out) {
  out = nullptr;
  if (num_rows > kMaxKeyRows || reader.remaining() < num_rows * num_rails * sizeof(uint32_t))
    return false;
  if (num_rows == 0) return true;
  auto rows = std::make_shared<KeyRows>(num_rows);
  for (Keys& row : *rows)
    for (size_t rail = 0; rail < num_rails; ++rail) row[rail] = reader.u32();
  out = std::move(rows);
  return true;
}

// The segments or sources that are the rest of a message. Of sources there may be more than of
// segments: a span that lies across pieces of memory is several.
template <typename T>
bool read_list(Reader& reader, uint64_t count, std::vector<T>& out) {
  return read_rest(reader, count, kMaxMessageBytes / sizeof(T), out);
}

}  // namespace kvxfer::verbs
