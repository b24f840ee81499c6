// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/control.hpp"

namespace kvxfer {
namespace {
constexpr uint8_t kRegionAdded = 1, kRegionRemoved = 2, kCredit = 3, kAttach = 4;
constexpr uint8_t kWritable = 1, kOnGpu = 2;   // of a region; after kOnGpu its ordinal
constexpr uint32_t kMaxDevices = 1024;         // of one machine
constexpr uint32_t kTokenMagic = 0x314c'564b;  // "KVL1"
constexpr size_t kMaxOffers = 16, kMaxOfferBytes = 2048;
constexpr size_t kMaxTransportBytes = 32, kMaxAttachBytes = 4096;
}  // namespace

Bytes encode(const Control& message) {
  Bytes out;
  Writer w(out);
  if (auto* added = std::get_if<RegionAdded>(&message)) {
    w.u8(kRegionAdded), w.u64(added->ref.id), w.put(added->ref.key), w.u64(added->nbytes);
    const bool on_gpu = added->device != kHostMemory;
    w.u8((added->writable ? kWritable : 0) | (on_gpu ? kOnGpu : 0)), w.text(added->name);
    if (on_gpu) w.u32(static_cast<uint32_t>(added->device));
  } else if (auto* removed = std::get_if<RegionRemoved>(&message)) {
    w.u8(kRegionRemoved), w.u64(removed->id);
  } else if (auto* attach = std::get_if<Attach>(&message)) {
    w.u8(kAttach), w.text(attach->transport), w.u8(attach->is_answer);
    w.u16(static_cast<uint16_t>(attach->data.size())), w.raw(attach->data);
  } else {
    w.u8(kCredit), w.u32(std::get<Credit>(message).count);
  }
  return out;
}

std::optional<Control> decode_control(ByteView payload) {
  Reader r(payload);
  Control out;
  switch (r.u8()) {
    case kRegionAdded: {
      RegionAdded added;
      added.ref.id = r.u64(), added.ref.key = r.get<Key>(), added.nbytes = r.u64();
      const uint8_t flags = r.u8();
      added.writable = (flags & kWritable) != 0, added.name = r.text(kMaxNameBytes);
      if (!is_printable(added.name) || (flags & ~(kWritable | kOnGpu)) != 0) return {};
      if ((flags & kOnGpu) != 0) {
        const uint32_t device = r.u32();
        if (device >= kMaxDevices) return {};
        added.device = static_cast<int>(device);
      }
      out = std::move(added);
      break;
    }
    case kRegionRemoved:
      out = RegionRemoved{r.u64()};
      break;
    case kCredit:
      out = Credit{r.u32()};
      break;
    case kAttach: {
      Attach attach;
      attach.transport = r.text(kMaxTransportBytes), attach.is_answer = r.u8() != 0;
      const size_t size = r.u16();
      if (size > kMaxAttachBytes) return {};
      const ByteView data = r.take(size);
      attach.data.assign(data.begin(), data.end());
      out = std::move(attach);
      break;
    }
    default:
      return {};
  }
  if (!r.finished()) return {};
  return out;
}

Bytes encode_offers(const std::vector<Offer>& offers) {
  Bytes out;
  Writer w(out);
  w.u8(static_cast<uint8_t>(offers.size()));
  for (const Offer& offer : offers) {
    w.text(offer.transport);
    w.u16(static_cast<uint16_t>(offer.data.size())), w.raw(offer.data);
  }
  return out;
}

std::optional<std::vector<Offer>> decode_offers(ByteView payload) {
  Reader r(payload);
  const size_t n = r.u8();
  if (n > kMaxOffers) return {};
  std::vector<Offer> out;
  for (size_t i = 0; i < n && r.ok(); ++i) {
    Offer offer{r.text(32), {}};
    const size_t size = r.u16();
    if (size > kMaxOfferBytes) return {};
    const ByteView data = r.take(size);
    offer.data.assign(data.begin(), data.end());
    out.push_back(std::move(offer));
  }
  if (!r.finished()) return {};
  return out;
}

Bytes encode_token(const Token& token) {
  Bytes out;
  Writer w(out);
  w.u32(kTokenMagic), w.put(token.owner), w.u64(token.lease.id), w.put(token.lease.key);
  return out;
}

std::optional<Token> decode_token(ByteView bytes) {
  Reader r(bytes);
  const uint32_t magic = r.u32();
  Token token;
  token.owner = r.get<Incarnation>(), token.lease.id = r.u64(), token.lease.key = r.get<Key>();
  if (!r.finished() || magic != kTokenMagic || token.lease.id == 0) return {};
  return token;
}

}  // namespace kvxfer
