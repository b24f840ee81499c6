// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the records of shm, cma and verbs have in common: plain structs, copied out of shared memory
// or a message whole before they are looked at.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/peer_text.hpp"
#include "common/wire.hpp"
#include "transport/transport.hpp"

namespace kvxfer {

// Which request of the sender (or, in an answer, of the receiver) a record belongs to.
struct Ticket {
  uint32_t slot = 0, generation = 0;
};

struct PartHead {
  Ticket ticket;
  uint64_t count = 0;  // of the elements that follow
};

struct OutcomeHead {  // then the text
  Ticket ticket;
  uint32_t code = 0;
  int32_t err = 0;
  uint64_t nbytes = 0;
  uint64_t span = kNoSpan;  // as the transport numbers what it sends
  uint64_t expected = 0, given = 0;
};

template <typename T>
ByteView view_of(const T& value) {
  return {reinterpret_cast<const std::byte*>(&value), sizeof(T)};
}
template <typename T>
ByteView view_of(std::span<const T> values) {
  return std::as_bytes(values);
}

// `count` elements that are the rest of a record; false when it does not have just those, or one of
// them is empty: that would cost memory and move nothing, so any number would be taken.
template <typename T>
bool read_rest(Reader& reader, uint64_t count, uint64_t most, std::vector<T>& out) {
  if (count > most || reader.remaining() != count * sizeof(T)) return false;
  out.resize(count);
  const ByteView bytes = reader.take(count * sizeof(T));
  if (count > 0) std::memcpy(out.data(), bytes.data(), bytes.size());
  for (const T& each : out)
    if (each.nbytes == 0) return false;
  return reader.finished();
}

// How a request ended, for its initiator. A failure's text goes behind the head.
inline OutcomeHead outcome_of(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure,
                              std::string& text) {
  OutcomeHead head{ticket, static_cast<uint32_t>(code), 0, nbytes, kNoSpan, 0, 0};
  if (failure != nullptr) {
    head.err = failure->err;
    head.span = failure->span;
    head.expected = failure->expected;
    head.given = failure->given;
    text = failure->text.substr(0, kMaxPeerText);
  }
  return head;
}

// And what the initiator makes of it; `nbytes`: of the whole request.
inline Completion completion_of(const OutcomeHead& head, uint64_t nbytes, std::string_view text) {
  Completion completion;
  completion.ok = head.code == 0;
  completion.nbytes = completion.ok ? nbytes : std::min(head.nbytes, nbytes);
  if (completion.ok) return completion;
  Failure& failure = completion.failure;
  failure.code = head.code <= kMaxCode ? static_cast<Code>(head.code) : Code::kInternal;
  failure.err = head.err;
  failure.span = head.span;
  failure.expected = head.expected;
  failure.given = head.given;
  failure.text = peer_text(text);
  return completion;
}

}  // namespace kvxfer
