// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What stands in the rings: plain structs, copied out of shared memory whole before they are looked
// at.
#pragma once

#include <cstdint>
#include <vector>

#include "common/wire.hpp"
#include "transport/shm/control.hpp"
#include "transport/transport.hpp"

namespace kvxfer::shm {

// Which request of the sender (or, in an outcome, of the receiver) a record belongs to.
struct Ticket {
  uint32_t slot = 0, generation = 0;
};

enum Flag : uint32_t { kHasNotify = 1, kHasArrival = 2, kMapped = 4, kInline = 8 };

struct RequestHead {
  Ticket ticket;
  uint32_t op = 0;
  uint32_t flags = 0;
  uint32_t notify_nbytes = 0;
  uint32_t num_spans = 0;  // that follow in this record
  uint64_t nbytes = 0;     // of the whole request
  RegionRef region;
  LeaseRef lease;
  uint64_t arrival = 0;
  uint64_t source = 0;  // id of the initiator's region, kMapped write
};

struct SpanRecord {
  uint64_t source = 0, target = 0;
  uint32_t nbytes = 0;
  uint32_t ordinal = 0;  // of the span within the request, for error messages
};

struct OutcomeHead {
  Ticket ticket;
  uint32_t code = 0;
  int32_t err = 0;
  uint64_t nbytes = 0;
  uint64_t span = kNoSpan;  // ordinal
  uint64_t expected = 0, given = 0;
};

struct PartHead {  // kReadPart, kSpans, kAbort, kReadDone
  Ticket ticket;
  uint64_t num_spans = 0;
};

struct GrantHead {  // kGranted
  Ticket ticket;
  uint64_t region = 0;     // the owner's id of it, as shown
  uint64_t num_spans = 0;  // of the request, from its first on
  WordRef region_word, lease_word;
};

struct StageHead {  // kStaged, kReadData
  Ticket ticket;
  uint32_t stage_slot = 0;
  uint32_t nbytes = 0;
  uint64_t num_spans = 0;  // kStaged
};

template <typename T>
ByteView view_of(const T& value) {
  return {reinterpret_cast<const std::byte*>(&value), sizeof(T)};
}
template <typename T>
ByteView view_of(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

// The spans at the end of a record; false when the count and the bytes left disagree.
inline bool read_spans(Reader& reader, uint64_t count, std::vector<SpanRecord>& out) {
  if (count > kMaxSpansPerRecord || reader.remaining() != count * sizeof(SpanRecord)) return false;
  out.resize(count);
  for (SpanRecord& span : out) span = reader.get<SpanRecord>();
  return reader.finished();
}

}  // namespace kvxfer::shm
