// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What stands in the rings, beside what transport/records.hpp has. OutcomeHead::span is a
// SpanRecord::index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transport/records.hpp"
#include "transport/shm/control.hpp"

namespace kvxfer::shm {

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

inline uint64_t total_bytes(std::span<const SpanRecord> spans) {
  uint64_t sum = 0;  // at most 1024 x 2^32: no overflow
  for (const SpanRecord& span : spans) sum += span.nbytes;
  return sum;
}

// The spans at the end of a record; false when the count and the bytes left disagree.
inline bool read_spans(Reader& reader, uint64_t count, std::vector<SpanRecord>& out) {
  return read_rest(reader, count, kMaxSpansPerRecord, out);
}

// A record of further spans of a request; false: malformed.
inline bool read_part(ByteView body, PartHead& head, std::vector<SpanRecord>& out) {
  Reader reader(body);
  head = reader.get<PartHead>();
  return reader.ok() && read_spans(reader, head.count, out);
}

}  // namespace kvxfer::shm
