// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Frames of the tcp transport: encoders and decoders without any socket (docs/wire_format.md).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/wire.hpp"
#include "transport/transport.hpp"

namespace kvxfer::tcp {

inline constexpr uint32_t kMagic = 0x3158'564b;  // "KVX1" in memory
inline constexpr std::byte kPlainHead{0x4b};     // its first byte
inline constexpr uint8_t kVersion = 1;
inline constexpr size_t kHeadBytes = 32;
inline constexpr size_t kTrailerBytes = 8;
inline constexpr uint32_t kMaxControlBytes = 64 * 1024;
inline constexpr uint32_t kMaxHandshakeBytes = 4 * 1024;  // before a peer is authenticated
inline constexpr uint32_t kMaxBodyBytes = 16 * 1024 * 1024;
// A stripe's pieces, head and trailer go down in one sendmsg of at most 1024 elements.
inline constexpr uint32_t kMaxPieces = 1000;
inline constexpr uint32_t kStripeBytes = 1024 * 1024;
inline constexpr uint32_t kSmallBytes = 16 * 1024;  // bodies that may go by lane 0
inline constexpr uint32_t kReadWindow = 64;         // READ frames unanswered, per connection

enum class Type : uint8_t {
  kHello = 1,
  kAuth = 2,
  kJoin = 3,
  kOffer = 4,
  kReady = 5,
  kStripe = 6,
  kRead = 7,
  kReadData = 8,
  kAck = 9,
  kRefuse = 10,
  kAbort = 11,
  kControl = 12,
  kBye = 13,
  kError = 14,
  kPing = 15,
  kPong = 16,
};
inline constexpr uint16_t kMaySkip = 1;  // flag: who does not know the type skips the frame

struct Head {
  Type type{};
  uint16_t flags = 0;
  uint32_t control_nbytes = 0, body_nbytes = 0;
  uint64_t request = 0;
  uint32_t cancel_count = 0;  // ABORTs that the owner must have seen on every lane before this
};
// Empty when magic, version or a length is out of bounds; `max_control` depends on who speaks.
std::optional<Head> decode_head(ByteView bytes, uint32_t max_control);
// Head and control in one buffer; `fill` appends the control bytes.
template <typename Fill>
void encode_frame(Head head, Bytes& out, Fill&& fill);
template <typename Fill>
Bytes encode_frame(Head head, Fill&& fill);
void write_head(const Head& head, std::byte* out) noexcept;

// STRIPE and READ share their control part: who may touch what, then descriptors, then payload.
struct StripeHead {
  Access access;
  uint64_t total_nbytes = 0;  // of the request, the same in each of its stripes
  uint64_t first_target = 0;  // number of this stripe's first descriptor within the request
  bool has_notify = false;
  uint32_t stripe = 0;  // READ: repeated in READ_DATA
  std::vector<Target> targets;
  ByteView notify;  // points into the control bytes
};
// Into `out`, which keeps its memory from frame to frame.
void encode_stripe(Head head, const StripeHead& stripe, ByteView notify, Bytes& out);
Bytes encode_stripe(Head head, const StripeHead& stripe, ByteView notify);
// False: malformed. Checks the sum of the descriptors against head.body_nbytes for a STRIPE, and
// against kStripeBytes for a READ. `out.targets` is reused, so a lane allocates once.
bool decode_stripe(const Head& head, ByteView control, StripeHead& out);

Bytes encode_read_data(uint64_t request, uint32_t stripe, uint32_t nbytes);
Bytes encode_acks(std::span<const uint64_t> requests);
Bytes encode_failure(Type type, uint64_t request, const Failure& failure);
std::optional<Failure> decode_failure(ByteView control);
Bytes encode_abort(uint64_t request, uint32_t cancel_count);
Bytes encode_plain(Type type, ByteView control);

// After the body: kOk, or the code that says why the rest of it is padding.
void write_trailer(Code code, std::byte* out) noexcept;
std::optional<Code> decode_trailer(ByteView bytes);

template <typename Fill>
void encode_frame(Head head, Bytes& out, Fill&& fill) {
  out.resize(kHeadBytes);
  Writer writer(out);
  fill(writer);
  head.control_nbytes = static_cast<uint32_t>(out.size() - kHeadBytes);
  write_head(head, out.data());
}

template <typename Fill>
Bytes encode_frame(Head head, Fill&& fill) {
  Bytes out;
  encode_frame(head, out, std::forward<Fill>(fill));
  return out;
}

}  // namespace kvxfer::tcp
