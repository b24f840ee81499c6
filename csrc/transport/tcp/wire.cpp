// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/wire.hpp"

#include <algorithm>

#include "common/peer_text.hpp"

namespace kvxfer::tcp {
namespace {
constexpr uint32_t kTrailerMagic = 0x2145'4e44;  // "DNE!": a desynchronised stream is noticed here
constexpr uint16_t kHasNotify = 1, kHasArrival = 2, kUniform = 4;
}  // namespace

void write_head(const Head& head, std::byte* out) noexcept {
  size_t at = 0;
  auto put = [&](auto value) {
    std::memcpy(out + at, &value, sizeof value);
    at += sizeof value;
  };
  put(kMagic), put(kVersion), put(static_cast<uint8_t>(head.type)), put(head.flags);
  put(head.control_nbytes), put(head.body_nbytes), put(head.request);
  put(head.cancel_count), put(uint32_t{0});
}

std::optional<Head> decode_head(ByteView bytes, uint32_t max_control) {
  Reader r(bytes);
  const uint32_t magic = r.u32();
  const uint8_t version = r.u8();
  Head head;
  head.type = static_cast<Type>(r.u8());
  head.flags = r.u16();
  head.control_nbytes = r.u32();
  head.body_nbytes = r.u32();
  head.request = r.u64();
  head.cancel_count = r.u32();
  if (r.u32() != 0 || !r.finished() || magic != kMagic || version != kVersion) return {};
  if (head.control_nbytes > max_control || head.body_nbytes > kMaxBodyBytes) return {};
  return head;
}

void encode_stripe(Head head, const StripeHead& stripe, ByteView notify, Bytes& out) {
  const auto& targets = stripe.targets;
  const bool uniform = targets.size() > 1 && std::ranges::all_of(targets, [&](const Target& t) {
                         return t.nbytes == targets.front().nbytes;
                       });
  encode_frame(head, out, [&](Writer& w) {
    w.u64(stripe.access.region.id), w.put(stripe.access.region.key);
    w.u64(stripe.access.lease.id), w.put(stripe.access.lease.key);
    w.u64(stripe.total_nbytes), w.u64(stripe.first_target),
        w.u64(stripe.access.arrival.value_or(0));
    w.u32(stripe.stripe), w.u32(static_cast<uint32_t>(notify.size()));
    w.u32(static_cast<uint32_t>(targets.size()));
    w.u16(static_cast<uint16_t>((stripe.has_notify ? kHasNotify : 0) |
                                (stripe.access.arrival ? kHasArrival : 0) |
                                (uniform ? kUniform : 0)));
    w.u16(static_cast<uint16_t>(stripe.access.op));
    if (uniform) w.u32(targets.front().nbytes);
    for (const Target& t : targets) {
      w.u64(t.offset);
      if (!uniform) w.u32(t.nbytes);
    }
    w.raw(notify);
  });
}

Bytes encode_stripe(Head head, const StripeHead& stripe, ByteView notify) {
  Bytes out;
  encode_stripe(head, stripe, notify, out);
  return out;
}

bool decode_stripe(const Head& head, ByteView control, StripeHead& out) {
  Reader r(control);
  out.access.region.id = r.u64(), out.access.region.key = r.get<Key>();
  out.access.lease.id = r.u64(), out.access.lease.key = r.get<Key>();
  out.total_nbytes = r.u64(), out.first_target = r.u64();
  const uint64_t arrival = r.u64();
  out.stripe = r.u32();
  const uint32_t notify_nbytes = r.u32(), num_targets = r.u32();
  const uint16_t flags = r.u16(), op = r.u16();
  const bool is_read = head.type == Type::kRead;
  if (!r.ok() || num_targets > kMaxPieces || notify_nbytes > kMaxNotificationBytes) return false;
  if (flags & ~(kHasNotify | kHasArrival | kUniform)) return false;
  if (op > static_cast<uint16_t>(Op::kNotify) ||
      (op == static_cast<uint16_t>(Op::kRead)) != is_read)
    return false;
  out.access.op = static_cast<Op>(op);
  out.has_notify = flags & kHasNotify;
  out.access.arrival = flags & kHasArrival ? std::optional(arrival) : std::nullopt;
  const bool uniform = flags & kUniform;
  const uint32_t each = uniform ? r.u32() : 0;
  out.targets.clear();
  uint64_t sum = 0;  // at most kMaxPieces * 2^32: cannot overflow
  for (uint32_t i = 0; i < num_targets && r.ok(); ++i) {
    Target t;
    t.offset = r.u64();
    t.nbytes = uniform ? each : r.u32();
    if (t.nbytes == 0) return false;
    sum += t.nbytes;
    out.targets.push_back(t);
  }
  out.notify = r.take(notify_nbytes);
  if (!r.finished() || sum > out.total_nbytes) return false;
  if (is_read) return head.body_nbytes == 0 && sum > 0 && sum <= kStripeBytes && notify_nbytes == 0;
  if (out.access.op == Op::kNotify && out.total_nbytes != 0) return false;
  return sum == head.body_nbytes && (out.total_nbytes == 0 || sum > 0);
}

Bytes encode_read_data(uint64_t request, uint32_t stripe, uint32_t nbytes) {
  return encode_frame({.type = Type::kReadData, .body_nbytes = nbytes, .request = request},
                      [&](Writer& w) { w.u32(stripe); });
}

Bytes encode_acks(std::span<const uint64_t> requests) {
  return encode_frame({.type = Type::kAck}, [&](Writer& w) {
    for (uint64_t id : requests) w.u64(id);
  });
}

Bytes encode_failure(Type type, uint64_t request, const Failure& failure) {
  return encode_frame({.type = type, .request = request}, [&](Writer& w) {
    w.u8(static_cast<uint8_t>(failure.code));
    w.u64(failure.span), w.u64(failure.expected), w.u64(failure.given);
    w.text(std::string_view(failure.text).substr(0, kMaxPeerText));
  });
}

std::optional<Failure> decode_failure(ByteView control) {
  Reader r(control);
  Failure failure;
  const uint8_t code = r.u8();
  failure.span = r.u64(), failure.expected = r.u64(), failure.given = r.u64();
  failure.text = peer_text(r.text(kMaxPeerText));
  if (!r.finished() || code > kMaxCode || code == 0) return {};
  failure.code = static_cast<Code>(code);
  return failure;
}

Bytes encode_abort(uint64_t request, uint32_t cancel_count) {
  return encode_frame({.type = Type::kAbort, .request = request, .cancel_count = cancel_count},
                      [](Writer&) {});
}

Bytes encode_plain(Type type, ByteView control) {
  return encode_frame({.type = type}, [&](Writer& w) { w.raw(control); });
}

void write_trailer(Code code, std::byte* out) noexcept {
  const uint32_t words[2] = {kTrailerMagic, static_cast<uint32_t>(code)};
  std::memcpy(out, words, sizeof words);
}

std::optional<Code> decode_trailer(ByteView bytes) {
  Reader r(bytes);
  const uint32_t magic = r.u32(), code = r.u32();
  if (!r.finished() || magic != kTrailerMagic || code > kMaxCode) return {};
  return static_cast<Code>(code);
}

}  // namespace kvxfer::tcp
