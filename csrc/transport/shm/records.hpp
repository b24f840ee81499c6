// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What stands in the rings: plain structs, copied out of shared memory whole before they are looked
// at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
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

// A Span as it stands in the request, so that spans go into the ring as they are.
struct SpanRecord {
  uint64_t source = 0, target = 0;
  uint32_t nbytes = 0;
  uint32_t index = 0;  // in the caller's arrays, for error messages
};
static_assert(sizeof(SpanRecord) == sizeof(Span) &&
              offsetof(SpanRecord, source) == offsetof(Span, local) &&
              offsetof(SpanRecord, target) == offsetof(Span, remote) &&
              offsetof(SpanRecord, nbytes) == offsetof(Span, nbytes) &&
              offsetof(SpanRecord, index) == offsetof(Span, index));

struct OutcomeHead {
  Ticket ticket;
  uint32_t code = 0;
  int32_t err = 0;
  uint64_t nbytes = 0;
  uint64_t span = kNoSpan;  // SpanRecord::index
  uint64_t expected = 0, given = 0;
};

struct PartHead {  // kReadPart, kCheck, kSpans, kAbort, kReadDone
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
};

template <typename T>
ByteView view_of(const T& value) {
  return {reinterpret_cast<const std::byte*>(&value), sizeof(T)};
}
template <typename T>
ByteView view_of(std::span<const T> values) {
  return std::as_bytes(values);
}

inline uint64_t total_bytes(std::span<const SpanRecord> spans) {
  uint64_t sum = 0;  // at most 1024 x 2^32: no overflow
  for (const SpanRecord& span : spans) sum += span.nbytes;
  return sum;
}

// The spans at the end of a record; false when the count and the bytes left disagree.
inline bool read_spans(Reader& reader, uint64_t count, std::vector<SpanRecord>& out) {
  if (count > kMaxSpansPerRecord || reader.remaining() != count * sizeof(SpanRecord)) return false;
  out.resize(count);
  const ByteView bytes = reader.take(count * sizeof(SpanRecord));
  if (count > 0) std::memcpy(out.data(), bytes.data(), bytes.size());
  // An empty span would cost memory and move nothing, so any number of them would be taken.
  for (const SpanRecord& span : out)
    if (span.nbytes == 0) return false;
  return reader.finished();
}

// A record of further spans of a request; false: malformed.
inline bool read_part(ByteView body, PartHead& head, std::vector<SpanRecord>& out) {
  Reader reader(body);
  head = reader.get<PartHead>();
  return reader.ok() && read_spans(reader, head.num_spans, out);
}

}  // namespace kvxfer::shm
