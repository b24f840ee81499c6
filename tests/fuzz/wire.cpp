// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Every decoder of bytes from the network: nothing is read out of bounds, limits hold, and what was
// decoded comes back from its encoder. The first byte chooses the decoder, the rest is its input.
#include "transport/tcp/wire.hpp"

#include "engine/control.hpp"
#include "fuzz.hpp"
#include "transport/tcp/handshake.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;
using kvxfer::fuzz::Input;
using kvxfer::fuzz::same;

namespace {

ByteView control_of(const Bytes& frame) { return ByteView(frame).subspan(kHeadBytes); }

void head(ByteView bytes) {
  const auto decoded = decode_head(bytes, kMaxControlBytes);
  if (!decoded) return;
  FUZZ_CHECK(decoded->control_nbytes <= kMaxControlBytes && decoded->body_nbytes <= kMaxBodyBytes);
  std::array<std::byte, kHeadBytes> again;
  write_head(*decoded, again.data());
  FUZZ_CHECK(same(again, bytes));
}

void stripe(Input& input, Type type) {
  const Head head{.type = type, .body_nbytes = input.u32() % (kMaxBodyBytes + 1)};
  const ByteView control = input.rest();
  StripeHead first, second;
  if (!decode_stripe(head, control, first)) return;
  FUZZ_CHECK(first.targets.size() <= kMaxPieces && first.notify.size() <= kMaxNotificationBytes);
  uint64_t sum = 0;
  for (const Target& target : first.targets) sum += target.nbytes;
  FUZZ_CHECK(type == Type::kRead ? sum <= kStripeBytes : sum == head.body_nbytes);
  FUZZ_CHECK(sum <= first.total_nbytes);
  // Equal sizes may have been spelled out, so the bytes need not be the same; what they say must.
  const Bytes again = encode_stripe(head, first, first.notify);
  FUZZ_CHECK(decode_stripe(head, control_of(again), second));
  FUZZ_CHECK(first.access.op == second.access.op);
  FUZZ_CHECK(first.access.region.id == second.access.region.id);
  FUZZ_CHECK(first.access.region.key == second.access.region.key);
  FUZZ_CHECK(first.access.lease.id == second.access.lease.id);
  FUZZ_CHECK(first.access.lease.key == second.access.lease.key);
  FUZZ_CHECK(first.total_nbytes == second.total_nbytes);
  FUZZ_CHECK(first.first_target == second.first_target);
  FUZZ_CHECK(first.has_notify == second.has_notify);
  FUZZ_CHECK(first.access.arrival == second.access.arrival && first.stripe == second.stripe);
  FUZZ_CHECK(same(first.notify, second.notify));
  FUZZ_CHECK(std::ranges::equal(first.targets, second.targets, [](auto& a, auto& b) {
    return a.offset == b.offset && a.nbytes == b.nbytes;
  }));
}

void failure(ByteView control) {
  const auto first = decode_failure(control);
  if (!first) return;
  for (char c : first->text) FUZZ_CHECK(c >= 0x20 && c <= 0x7e);
  const Bytes again = encode_failure(Type::kRefuse, 1, *first);
  FUZZ_CHECK(control_of(again).size() == control.size());  // only unprintable text was replaced
  const auto second = decode_failure(control_of(again));
  FUZZ_CHECK(second && second->code == first->code && second->span == first->span);
  FUZZ_CHECK(second->expected == first->expected && second->given == first->given);
  FUZZ_CHECK(second->text == first->text);
}

void control(ByteView payload) {
  const auto first = decode_control(payload);
  if (!first) return;
  const Bytes again = encode(*first);
  FUZZ_CHECK(again.size() == payload.size());
  const auto second = decode_control(again);
  FUZZ_CHECK(second && encode(*second) == again);  // "is answer" is any byte but 0
}

void trailer(ByteView bytes) {
  const auto code = decode_trailer(bytes);
  if (!code) return;
  std::array<std::byte, kTrailerBytes> again;
  write_trailer(*code, again.data());
  FUZZ_CHECK(same(again, bytes));
}

// The reader itself: whatever is asked of it in whatever order, it stays inside and errors stick.
void reader(Input& input) {
  const ByteView script = input.take(input.u8());
  Reader reader(input.rest());
  bool ok = true;
  for (std::byte step : script) {
    const size_t before = reader.remaining(), n = std::to_integer<size_t>(step) / 8;
    switch (std::to_integer<int>(step) % 8) {
      case 0:
        reader.u8();
        break;
      case 1:
        reader.u16();
        break;
      case 2:
        reader.u32();
        break;
      case 3:
        reader.u64();
        break;
      case 4:
        FUZZ_CHECK(reader.text(n).size() <= n || !reader.ok());
        break;
      case 5:
        FUZZ_CHECK(reader.take(n).size() == (reader.ok() ? n : 0));
        break;
      case 6:
        reader.get<Key>();
        break;
      default:
        FUZZ_CHECK(reader.take(~size_t{0}).empty());
        break;
    }
    FUZZ_CHECK(reader.remaining() <= before);
    FUZZ_CHECK(ok || !reader.ok());
    ok = reader.ok();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  switch (input.u8() % 12) {
    case 0:
      head(input.rest());
      break;
    case 1:
      stripe(input, Type::kStripe);
      break;
    case 2:
      stripe(input, Type::kRead);
      break;
    case 3:
      failure(input.rest());
      break;
    case 4: {
      const ByteView bytes = input.rest();
      if (const auto hello = decode_hello(bytes))
        FUZZ_CHECK(same(control_of(encode_hello(*hello)), bytes));
      break;
    }
    case 5: {
      const ByteView bytes = input.rest();
      if (const auto join = decode_join(bytes))
        FUZZ_CHECK(same(control_of(encode_join(*join)), bytes));
      break;
    }
    case 6:
      control(input.rest());
      break;
    case 7: {
      const ByteView bytes = input.rest();
      if (const auto offers = decode_offers(bytes)) FUZZ_CHECK(same(encode_offers(*offers), bytes));
      break;
    }
    case 8:
      trailer(input.rest());
      break;
    default:
      reader(input);
  }
  return 0;
}
