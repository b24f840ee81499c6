// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A hostile peer over shared memory. The input is a script of what it does to the rings, the slot
// words, the positions and flags, and the Unix socket, between requests of ours; the connection is
// driven as the progress thread would. Then: no byte outside a lease changed, no request of ours
// without exactly one end, no memory that has quiesced touched again.
#include <sys/eventfd.h>

#include "script.hpp"
#include "shm_peer.hpp"

using namespace kvxfer;
using namespace kvxfer::shm;
using kvxfer::fuzz::Input;
using kvxfer::fuzz::kKey;
using kvxfer::fuzz::number;
using kvxfer::fuzz::ShmHost;
using kvxfer::fuzz::ShmPeer;
using kvxfer::fuzz::ticket;

namespace {

constexpr int kMaxSteps = 64;

// Spans of one size in equal steps.
std::vector<SpanRecord> spans(Input& input) {
  const uint8_t how = input.u8();
  const size_t count = how < 0xc0 ? how & 7 : how < 0xf0 ? (how & 15) * 70 : kMaxSpansPerRecord;
  SpanRecord span{.source = number(input), .target = number(input), .nbytes = 0, .index = 0};
  const uint64_t step = number(input);
  span.nbytes = static_cast<uint32_t>(number(input));
  std::vector<SpanRecord> out;
  for (size_t i = 0; i < count; ++i) {
    out.push_back(span);
    span.source += step, span.target += step, ++span.index;
  }
  return out;
}

std::span<const SpanRecord> all(const std::vector<SpanRecord>& spans) { return spans; }

void set_slot(ShmPeer& peer, int side, Ticket ticket, Slot state) {
  peer.side(side).slots[ticket.slot % kNumSlots].store(slot_word(ticket.generation, state));
}

void request(Input& input, ShmPeer& peer) {
  RequestHead head;
  const uint8_t how = input.u8(), region = input.u8();
  head.ticket = ticket(input);
  head.op = how < 0xf8 ? how % 3 : how;
  head.flags = input.u8();
  head.region = {region & 3u, kKey};
  head.lease = {(region & 0x40) != 0 ? (region >> 2) & 3u : region & 3u, kKey};
  if ((region & 0x80) != 0) head.region.key[3] = std::byte{1};
  if ((how & 0x40) != 0) head.lease = {};
  head.arrival = number(input);
  head.source = number(input);
  Bytes notify;
  if ((head.flags & kHasNotify) != 0) notify.resize(number(input) % (kMaxNotificationBytes + 2));
  const auto targets = spans(input);
  const bool inlined = (head.flags & kInline) != 0 || head.op == static_cast<uint32_t>(Op::kRead);
  head.nbytes = (how & 0x20) != 0 ? number(input) : total_bytes(targets);
  head.notify_nbytes = static_cast<uint32_t>(notify.size());
  head.num_spans = inlined ? static_cast<uint32_t>(targets.size()) : 0;
  if ((how & 0x80) == 0) set_slot(peer, 1, head.ticket, Slot::kPosted);
  peer.message(Type::kRequest,
               {view_of(head), notify, inlined ? view_of(all(targets)) : ByteView{}});
}

// A write with more spans than one record holds: judged first, then copied from staging slots or,
// when the peer has shown a region, from there.
void long_write(Input& input, ShmPeer& peer) {
  const size_t count = input.u16() % 2500;
  const auto nbytes = static_cast<uint32_t>(1 + input.u8() % 64);
  const uint8_t how = input.u8();
  RequestHead head;
  head.ticket = ticket(input);
  if ((how & 1) != 0) head.flags = kMapped;
  head.region = {ShmHost::kSplit, kKey}, head.lease = {ShmHost::kSplit, kKey};
  head.source = number(input);
  head.nbytes = count * nbytes;
  set_slot(peer, 1, head.ticket, Slot::kPosted);
  peer.message(Type::kRequest, {view_of(head)});
  std::vector<SpanRecord> targets(count);
  for (size_t i = 0; i < count; ++i)
    targets[i] = {
        .source = i % 128, .target = 5000 + i * nbytes % 6000, .nbytes = nbytes, .index = 0};
  if ((how & 2) != 0 && count > 0) targets[input.u16() % count].target = number(input);
  const auto parts = [&](Type type) {
    for (size_t at = 0; at < count; at += kMaxSpansPerRecord) {
      const auto part = all(targets).subspan(at, std::min<size_t>(count - at, kMaxSpansPerRecord));
      peer.bulk(type, {view_of(PartHead{head.ticket, part.size()}), view_of(part)});
      if ((how & 4) != 0) peer.connection().poll();
      if (type != Type::kSpans || (how & 1) != 0) continue;
      auto left = static_cast<uint32_t>(part.size() * nbytes);
      for (uint32_t slot = 0; left > 0; ++slot) {
        const uint32_t n = std::min(left, kStageSlotBytes);
        peer.bulk(Type::kStaged, {view_of(StageHead{head.ticket, slot % kNumStageSlots, n})});
        left -= n;
      }
    }
  };
  if ((how & 8) == 0) parts(Type::kCheck);
  parts(Type::kSpans);
}

void part(Input& input, ShmPeer& peer) {
  static constexpr Type kTypes[] = {Type::kReadPart, Type::kCheck, Type::kSpans, Type::kAbort,
                                    Type::kReadDone};
  const uint8_t how = input.u8();
  const Type type = kTypes[how % 5];
  PartHead head{ticket(input), 0};
  const bool bare = type == Type::kAbort || type == Type::kReadDone;
  const auto targets = bare ? std::vector<SpanRecord>{} : spans(input);
  head.count = (how & 0x80) != 0 ? number(input) : targets.size();
  const std::initializer_list<ByteView> parts = {view_of(head), view_of(all(targets))};
  const bool is_bulk = type == Type::kCheck || type == Type::kSpans;
  is_bulk != ((how & 0x40) != 0) ? peer.bulk(type, parts) : peer.message(type, parts);
}

void stage(Input& input, ShmPeer& peer) {
  const uint8_t how = input.u8();
  const StageHead head{ticket(input), (how & 2) != 0 ? input.u32() : how >> 3,
                       static_cast<uint32_t>(number(input))};
  peer.bulk((how & 1) != 0 ? Type::kReadData : Type::kStaged, {view_of(head)});
}

// What an owner answers to a request of ours.
void answer(Input& input, ShmPeer& peer) {
  const uint8_t how = input.u8();
  const Ticket of = ticket(input);
  if ((how & 0x80) != 0) set_slot(peer, 0, of, Slot::kAccepted);
  if ((how & 1) != 0) {
    GrantHead head{of, number(input), number(input), {}, {}};
    if ((how & 2) != 0) head.region_word = {input.u32() % 8, 0, number(input)};
    if ((how & 4) != 0) head.lease_word = {input.u32(), 0, number(input)};
    peer.message(Type::kGranted, {view_of(head)});
  } else {
    OutcomeHead head{of, 0, 0, number(input), kNoSpan, 0, 0};
    if ((how & 2) != 0) head.code = input.u8(), head.span = number(input);
    peer.message(Type::kOutcome, {view_of(head), input.take(how >> 3 & 15)});
  }
}

void scribble(Input& input, ShmPeer& peer) {
  const uint8_t how = input.u8();
  Side& side = peer.side(how >> 7);
  const uint64_t value = number(input);
  const auto change = [&](auto& word) {
    using T = decltype(word.load());
    if ((how & 0x40) != 0)
      word.fetch_add(static_cast<T>(value));
    else
      word.store(static_cast<T>(value));
  };
  switch (how & 15) {
    case 0:
      return change(side.messages.tail);
    case 1:
      return change(side.messages.head);
    case 2:
      return change(side.bulk.tail);
    case 3:
      return change(side.bulk.head);
    case 4:
      return change(side.messages.sleeping);
    case 5:
      return change(side.messages.starving);
    case 6:
      return change(side.bulk.sleeping);
    case 7:
      return change(side.bulk.starving);
    case 8:
      return change(side.stage_head);
    case 9:
      return change(side.slots[input.u8() & 7]);
    default: {
      // Bytes, near the start of a ring or anywhere.
      const ByteView bytes = input.take(input.u8());
      std::byte* base = (how & 15) < 13 ? side.message_data : side.bulk_data;
      const uint64_t room = (how & 15) < 13 ? kMessageRingBytes : kBulkRingBytes;
      const uint64_t at = value % room;
      if (!bytes.empty())
        std::memcpy(base + at, bytes.data(), std::min<uint64_t>(bytes.size(), room - at));
    }
  }
}

void socket_message(Input& input, ShmPeer& peer) {
  static const auto sealed = make_owned("kvxfer-fuzz-theirs", 64 * 1024);
  static const auto tiny = make_owned("kvxfer-fuzz-tiny", 16);
  static const auto words = make_owned("kvxfer-fuzz-words", ExportedWords::kBytes);
  static const Fd loose(::memfd_create("kvxfer-fuzz-loose", MFD_CLOEXEC)),
      event(::eventfd(0, EFD_CLOEXEC));
  static const int kFds[] = {sealed.fd.get(), tiny.fd.get(), words.fd.get(), loose.get(),
                             event.get()};
  [[maybe_unused]] static const bool filled = [] {
    std::memset(sealed.mapping->data(), static_cast<int>(fuzz::kTheirs), sealed.mapping->size());
    return true;
  }();
  const uint8_t how = input.u8();
  const size_t num_fds = how & 3;
  std::array<int, 3> fds{};
  for (size_t i = 0; i < num_fds; ++i) fds[i] = kFds[input.u8() % 5];
  const uint32_t type = (how >> 2 & 7) < 5 ? how >> 2 & 7 : input.u32();
  if ((how & 0x80) != 0) {
    peer.send_raw(input.take(input.u8()), {fds.data(), num_fds});
  } else {
    const uint64_t region = number(input), nbytes = number(input);
    peer.announce(type, region, nbytes, input.take((how & 0x40) != 0 ? input.u8() : 0),
                  {fds.data(), num_fds});
  }
  peer.make_it_read_the_socket();
}

// The application: a request, a cancel, a lease or a region that ends.
void engine(Input& input, ShmHost& host, ShmPeer& peer) {
  const uint8_t how = input.u8();
  switch (how & 7) {
    case 5:
      return host.cancel(peer.connection(), how >> 3);
    case 6:
      return host.revoke(how >> 3);
    case 7:
      return host.deregister(how >> 3);
    default:
      break;
  }
  const auto op = static_cast<Op>((how & 7) % 3);
  static constexpr size_t kCounts[] = {1, 3, 64, 1100, 2200, 5000, 0, 7};
  const uint32_t nbytes = 1 + input.u8() % 128;  // in this order, whatever the compiler's is
  const uint64_t remote = number(input) % 4096;
  const auto request = host.next(op, (how & 0x80) != 0, kCounts[how >> 3 & 7], nbytes, remote);
  if (!request) return;
  host.post(peer.connection(), request, (how & 0x40) != 0);
}

void step(Input& input, ShmHost& host, ShmPeer& peer) {
  switch (input.u8() % 16) {
    case 0:
      return void(peer.connection().poll());
    case 1:
      return peer.hear();
    case 2:
    case 3:
      return request(input, peer);
    case 4:
      return long_write(input, peer);
    case 5:
    case 6:
      return part(input, peer);
    case 7:
      return stage(input, peer);
    case 8:
    case 9:
      return answer(input, peer);
    case 10:
      return scribble(input, peer);
    case 11:
      return socket_message(input, peer);
    case 12: {
      const auto type = static_cast<Type>(input.u8() % 13);
      return peer.message(type, {input.take(input.u8())});
    }
    case 13: {
      const auto type = static_cast<Type>(input.u8() % 13);
      return peer.bulk(type, {input.take(input.u8())});
    }
    default:
      return engine(input, host, peer);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  ShmHost host;
  {
    ShmPeer peer(host);
    for (int i = 0; i < kMaxSteps && !input.empty(); ++i) {
      const bool quiet = (input.u8() & 1) != 0;  // several things before the engine looks
      step(input, host, peer);
      if (!quiet) peer.connection().poll();
    }
    for (int i = 0; i < 4; ++i) peer.connection().poll();
    peer.leave();
  }
  host.check();
  return 0;
}
