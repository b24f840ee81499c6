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

inline constexpr uint32_t kVersion = 2;
inline constexpr uint32_t kNumSlots = kMaxInFlight;   // of requests, per direction
inline constexpr uint32_t kMaxSegments = 1024;        // per message
inline constexpr uint32_t kMaxDataBytes = 32 * 1024;  // of memory, in one message
inline constexpr uint32_t kMaxMessageBytes = 96 * 1024;
inline constexpr uint32_t kMaxKeyRows = 256;  // per message

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
};

enum Flag : uint32_t {
  kHasNotify = 1,
  kHasArrival = 2,
  kStaged = 4,  // a write: its bytes come in messages; a read: they must, it cannot be pulled
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
