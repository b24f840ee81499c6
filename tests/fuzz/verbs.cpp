// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A hostile peer over verbs. The input is a script of what it says, what its NIC is told to do and
// which packets wait, between requests of ours; the connection and the NICs are driven by one
// thread, and time is put forward. Then: no byte outside of a lease, or of the spans of a read,
// changed; no request of ours without exactly one end; no memory that is quiet touched again; what
// is to be quiet is so within a second, though the peer does nothing; the device has nothing left.
#include <arpa/inet.h>

#include "script.hpp"
#include "verbs_peer.hpp"

using namespace kvxfer;
using namespace kvxfer::verbs;
using kvxfer::fuzz::Input;
using kvxfer::fuzz::kKey;
using kvxfer::fuzz::number;
using kvxfer::fuzz::ticket;
using kvxfer::fuzz::VerbsHost;
using kvxfer::fuzz::VerbsPeer;

namespace {

constexpr int kMaxSteps = 64;

// Memory and keys: the peer's, ours that it was told of, or any.
uint64_t address(Input& input, const VerbsPeer& peer) {
  const uint8_t how = input.u8();
  switch (how >> 5) {
    case 5:
      return peer.our_window + number(input);
    case 6:
      return peer.our_address + number(input);
    case 7:
      return number(input);
    default:
      return VerbsPeer::address() + how * 64;
  }
}

uint32_t key(Input& input, const VerbsPeer& peer) {
  const uint8_t how = input.u8();
  switch (how >> 5) {
    case 5:
      return peer.our_window_key;
    case 6:
      return peer.our_key;
    case 7:
      return static_cast<uint32_t>(number(input));
    default:
      return VerbsPeer::key();
  }
}

// In an answer: mostly the one of ours that was heard last.
Ticket ticket_of_ours(Input& input, const VerbsPeer& peer) {
  const uint8_t how = input.u8();
  if (how < 0xc0) return peer.last;
  return {how & 7u, (how >> 3) & 3u};
}

uint32_t rail(Input& input, const VerbsPeer& peer) {
  const uint8_t how = input.u8();
  return how < 0xf8 ? how % static_cast<uint32_t>(peer.num_rails()) : how;
}

// Rows of keys, each with one for every rail.
std::vector<uint32_t> rows(Input& input, const VerbsPeer& peer, uint32_t& num) {
  const uint8_t how = input.u8();
  num = how < 0xe0 ? 1 : how & 7;
  std::vector<uint32_t> out(num * peer.num_rails(), VerbsPeer::key());
  if (how >= 0x80 && !out.empty()) out[0] = key(input, peer);
  return out;
}

template <typename T>
std::span<const T> all(const std::vector<T>& some) {
  return some;
}

// Of one size, in equal steps.
std::vector<Segment> segments(Input& input, const VerbsPeer& peer) {
  const uint8_t how = input.u8();
  const size_t count = how < 0xc0 ? how & 7 : how < 0xf0 ? (how & 15) * 70 : kMaxSegments;
  Segment each{address(input, peer), number(input), static_cast<uint32_t>(number(input)), 0};
  if ((how & 8) != 0) each.row = input.u8();
  const uint64_t step = number(input);
  std::vector<Segment> out;
  for (size_t i = 0; i < count; ++i) {
    out.push_back(each);
    each.target += step;
  }
  return out;
}

// Of the last chains of requests.
std::vector<uint32_t> immediates(Input& input, size_t count) {
  std::vector<uint32_t> out;
  for (; count > 0; --count) {
    const Ticket of = ticket(input);
    out.push_back(Immediate{of.slot, of.generation, input.u8() & 3u, true}.pack());
  }
  return out;
}

void request(Input& input, VerbsPeer& peer) {
  RequestHead head;
  const uint8_t how = input.u8(), region = input.u8();
  head.ticket = ticket(input);
  head.op = how < 0xf8 ? how % 3 : how;
  head.flags = input.u8();
  head.region = {region & 3u, kKey};
  head.lease = {(region & 0x40) != 0 ? (region >> 2) & 3u : region & 3u, kKey};
  if ((region & 0x80) != 0) head.region.key[3] = std::byte{1};
  if ((how & 0x40) != 0) head.lease = {};
  head.arrival = (head.flags & kHasArrival) != 0 ? number(input) : 0;
  Bytes notify;
  if ((head.flags & kHasNotify) != 0) notify.resize(number(input) % (kMaxNotificationBytes + 2));
  const auto keys = rows(input, peer, head.num_rows);
  auto targets = head.op == static_cast<uint32_t>(Op::kNotify) ? std::vector<Segment>{}
                                                               : segments(input, peer);
  for (const Segment& each : targets) head.nbytes += each.nbytes;
  if ((how & 0x20) != 0) head.nbytes += number(input);
  head.notify_nbytes = static_cast<uint32_t>(notify.size());
  head.num_segments = static_cast<uint32_t>(targets.size());
  peer.message(Type::kRequest, {view_of(head), notify, view_of(all(keys)), view_of(all(targets))});
}

void part(Input& input, VerbsPeer& peer) {
  ListHead head{ticket(input), 0, 0};
  const auto keys = rows(input, peer, head.num_rows);
  const auto targets = segments(input, peer);
  head.num_segments = static_cast<uint32_t>(targets.size());
  peer.message(Type::kPart, {view_of(head), view_of(all(keys)), view_of(all(targets))});
}

void about_a_ticket(Input& input, VerbsPeer& peer) {
  static constexpr Type kTypes[] = {Type::kMore, Type::kAbort, Type::kReadDone, Type::kUseMessages};
  const uint8_t how = input.u8();
  peer.message(
      kTypes[how % 4],
      {view_of(PartHead{how % 4 == 0 || how % 4 == 3 ? ticket_of_ours(input, peer) : ticket(input),
                        0})});
}

void data(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  const Ticket of = (how & 1) != 0 ? ticket_of_ours(input, peer) : ticket(input);
  const DataHead head{of, static_cast<uint32_t>(number(input)), 0};
  const Bytes bytes(std::min(head.nbytes, kMaxDataBytes + 1), fuzz::kTheirs);
  peer.message((how & 1) != 0 ? Type::kReadData : Type::kWriteData, {view_of(head), bytes});
}

void outcome(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  OutcomeHead head{ticket_of_ours(input, peer), 0, 0, number(input), kNoSpan, 0, 0};
  if ((how & 1) != 0) head.code = input.u8(), head.span = number(input);
  peer.message(Type::kOutcome, {view_of(head), input.take(how >> 4)});
}

// What our read has asked for, or anything.
void grant(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  GrantHead head;
  head.ticket = ticket_of_ours(input, peer);
  const uint64_t word = address(input, peer);
  uint64_t open = 0;
  std::memset(&open, static_cast<int>(fuzz::kTheirs), sizeof open);
  head.region = {word, (how & 2) != 0 ? number(input) : open, 1};
  if ((how & 4) != 0) head.lease = {word, (how & 8) != 0 ? number(input) : open, 1};
  if ((how & 0x30) == 0x30) head.region.present = 0;
  const auto keys = rows(input, peer, head.num_rows);
  std::vector<Source> sources;
  if ((how & 1) == 0) {
    for (const Segment& each : peer.heard(head.ticket.slot).segments)
      sources.push_back({VerbsPeer::address() + 1024, each.nbytes, 0});
  } else {
    for (const Segment& each : segments(input, peer))
      sources.push_back({each.address, each.nbytes, each.row});
  }
  if ((how & 0x40) != 0 && !sources.empty()) sources.resize(input.u8() % sources.size() + 1);
  head.num_sources = static_cast<uint32_t>(sources.size());
  peer.message(Type::kGranted, {view_of(head), view_of(all(keys)), view_of(all(sources))});
}

// A queue pair of its own, a fresh one mostly, or none; of the epoch that comes next, mostly.
void queue_pair(Input& input, VerbsPeer& peer) {
  static constexpr std::array<std::pair<Type, VerbsPeer::Kind>, 8> kTypes = {{
      {Type::kPullBroken, VerbsPeer::kNumKinds},
      {Type::kNewSource, VerbsPeer::kSource},
      {Type::kNewPuller, VerbsPeer::kPull},
      {Type::kSourceReady, VerbsPeer::kNumKinds},
      {Type::kPushBroken, VerbsPeer::kNumKinds},
      {Type::kNewSink, VerbsPeer::kSink},
      {Type::kNewPusher, VerbsPeer::kWriter},
      {Type::kNewControl, VerbsPeer::kControl},
  }};
  static constexpr VerbsPeer::Kind kAbout[] = {
      VerbsPeer::kSource, VerbsPeer::kPull,   VerbsPeer::kSource, VerbsPeer::kPull,
      VerbsPeer::kSink,   VerbsPeer::kWriter, VerbsPeer::kSink,   VerbsPeer::kControl};
  const uint8_t how = input.u8();
  const auto [type, kind] = kTypes[how % 8];
  QpHead head;
  head.rail = rail(input, peer);
  if (kind != VerbsPeer::kNumKinds && (how & 0x40) == 0 && head.rail < peer.num_rails()) {
    const QpEnd end = peer.fresh(kind, head.rail);
    head.number = end.number, head.psn = end.psn;
  } else if ((how & 0x20) != 0) {
    head.number = input.u32();
  }
  const uint8_t epoch = input.u8();
  // What was told last; of a new one of its own, the next.
  if (head.rail < peer.num_rails()) head.epoch = peer.told(kAbout[how % 8], head.rail).epoch;
  if (type == Type::kNewSource || type == Type::kNewSink) ++head.epoch;
  head.epoch = epoch < 0x40 ? head.epoch : epoch < 0xf0 ? epoch & 7u : input.u32();
  const auto rest = immediates(input, type == Type::kNewPusher ? how >> 3 & 3 : 0);
  peer.message(type, {view_of(head), view_of(all(rest))});
}

void window(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  const uint64_t lease = (how & 0x80) != 0 ? number(input) : (how >> 4 & 3);
  switch (how & 7) {
    case 0: {
      AskWindowHead head{{lease, kKey}, {lease, kKey}};
      if ((how & 8) != 0) head.lease.id = number(input);
      return peer.message(Type::kAskWindow, {view_of(head)});
    }
    case 1:
    case 2: {
      std::vector<Extent> extents;
      uint64_t begin = number(input);
      WindowHead head{lease, address(input, peer), begin, 0, number(input), 0, 0};
      const uint8_t count = input.u8();
      for (size_t n = count & 7; n > 0; --n) {
        const uint64_t nbytes = number(input);
        extents.push_back({begin, begin + nbytes});
        begin += nbytes + (count & 8);
      }
      head.nbytes = (count & 16) != 0 ? number(input) : begin - head.offset;
      head.num_extents = static_cast<uint32_t>(extents.size());
      head.total_extents = head.num_extents + (count >> 5);
      return peer.message(Type::kWindow, {view_of(head), view_of(all(extents))});
    }
    case 3: {
      WindowKeyHead head{lease, rail(input, peer), input.u8(), key(input, peer), 0};
      return peer.message(Type::kWindowKey, {view_of(head)});
    }
    case 4: {
      NoWindowHead head{lease, 0, 0, 0, 0};
      if ((how & 8) != 0) head.code = input.u8(), head.never = input.u8() & 1;
      return peer.message(Type::kNoWindow, {view_of(head)});
    }
    case 5:
      return peer.message(Type::kRevoke, {view_of(lease)});
    case 6:
      return peer.message(Type::kDrained, {view_of(lease)});
    default: {
      SinkHead head{rail(input, peer), input.u8(), input.u8() & 1u, 0};
      head.posted = static_cast<uint32_t>(number(input));
      const auto held = immediates(input, how >> 4 & 3);
      return peer.message((how & 8) != 0 ? Type::kPushCredit : Type::kSinkReady,
                          {view_of(head), view_of(all(held))});
    }
  }
}

// Its NIC writes, mostly through the window that it was given, or reads.
void rdma(Input& input, VerbsPeer& peer) {
  static constexpr ibv_wr_opcode kOpcodes[] = {IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_WRITE,
                                               IBV_WR_RDMA_READ};
  const uint8_t how = input.u8();
  const Ticket of = ticket(input);
  const Immediate immediate{of.slot & 1023, of.generation, how >> 4 & 3u, (how & 8) == 0};
  const uint64_t to = (how & 0x40) != 0 ? address(input, peer) : peer.our_window + number(input);
  const uint32_t rkey = (how & 0x80) != 0 ? key(input, peer) : peer.our_window_key;
  const bool reads = how % 3 == 2;
  peer.rdma(reads ? VerbsPeer::kPull : VerbsPeer::kWriter, input.u8() % peer.num_rails(),
            kOpcodes[how % 3], to, rkey, static_cast<uint32_t>(number(input)),
            htonl(immediate.pack()));
}

// Its messages go over another rail from here on, or so it says.
void resume(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  const size_t over = how % peer.num_rails();
  const uint32_t turn = (how & 2) != 0 ? peer.our_turn() : static_cast<uint32_t>(number(input));
  uint32_t received = peer.received();
  if ((how & 4) != 0) received -= input.u8();
  peer.say(over, {static_cast<uint32_t>(Type::kResume), 0, received, turn}, {});
  if ((how & 8) == 0) peer.carry_on(over);
}

// A fragment of which nothing need be right.
void fragment(Input& input, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  const uint8_t type = input.u8();
  const ByteView bytes = input.take(input.u8());
  VerbsPeer::Head head{type & 31u, static_cast<uint32_t>(bytes.size()), peer.received(),
                       peer.sent()};
  if ((how & 1) != 0) head.nbytes = static_cast<uint32_t>(number(input));
  if ((how & 2) != 0) head.received += static_cast<uint32_t>(number(input));
  if ((how & 4) != 0) head.number += static_cast<uint32_t>(number(input));
  if ((how & 8) != 0) return peer.say(how % peer.num_rails(), head, bytes);
  peer.fragment(head, bytes);
}

// What happens to packets to one of our queue pairs; and time.
void network(Input& input, VerbsHost& host, VerbsPeer& peer) {
  static constexpr ibv_wc_status kStatuses[] = {IBV_WC_RETRY_EXC_ERR, IBV_WC_REM_ACCESS_ERR,
                                                IBV_WC_RNR_RETRY_EXC_ERR, IBV_WC_LOC_PROT_ERR,
                                                IBV_WC_REM_OP_ERR};
  static constexpr int64_t kTimes[] = {100'000'000, 210'000'000, 260'000'000, 1'000'000'000};
  const uint8_t how = input.u8();
  const uint32_t ours = peer.our_number(how >> 3);
  switch (how & 7) {
    case 0:
    case 1:
      return peer.hold(ours);
    case 2:
      return fake_verbs_pass(ours, 1 + input.u8() % 4);
    case 3:
      return fake_verbs_release(ours);
    case 4:
      return fake_verbs_fail_next(ours, kStatuses[input.u8() % 5]);
    case 5:
      return (void)peer.connection().on_queue_pair_event(*VerbsHost::devices()[0], ours,
                                                         "an event");
    default:
      return host.pass_time(kTimes[how >> 3 & 3]);
  }
}

// The application: a request, a cancel, a lease or a region that ends.
void engine(Input& input, VerbsHost& host, VerbsPeer& peer) {
  const uint8_t how = input.u8();
  switch (how & 7) {
    case 5:
      return host.cancel(peer.connection(), how >> 3);
    case 6:
      host.revoke(how >> 3);
      return peer.connection().lease_closed();
    case 7:
      host.deregister(how >> 3);
      return peer.connection().lease_closed();
    default:
      break;
  }
  const auto op = static_cast<Op>((how & 7) % 3);
  static constexpr size_t kCounts[] = {1, 3, 64, 1100, 2200, 7, 0, 2};
  const uint8_t more = input.u8();
  const auto request = host.next(op, (how & 0x80) == 0, kCounts[how >> 3 & 7], 1 + more % 128,
                                 number(input) % 4096, 8);
  if (!request) return;
  // Under a lease of the peer's, for which there may be a window.
  if ((more & 0x80) != 0) request->lease = {uint64_t{1} + (how >> 6 & 1), kKey};
  host.post(peer.connection(), request, (how & 0x40) != 0);
}

void step(Input& input, VerbsHost& host, VerbsPeer& peer) {
  switch (input.u8() % 20) {
    case 0:
      return peer.hear();
    case 1:
    case 2:
      return request(input, peer);
    case 3:
      return part(input, peer);
    case 4:
      return about_a_ticket(input, peer);
    case 5:
      return data(input, peer);
    case 6:
      return outcome(input, peer);
    case 7:
    case 8:
      return grant(input, peer);
    case 9:
      return queue_pair(input, peer);
    case 10:
    case 11:
      return window(input, peer);
    case 12:
      return rdma(input, peer);
    case 13:
      return resume(input, peer);
    case 14:
      return fragment(input, peer);
    case 15:
    case 16:
      return network(input, host, peer);
    default:
      return engine(input, host, peer);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  VerbsHost host;
  const uint8_t how = input.u8();
  const bool push = (how & 1) != 0;
  {
    VerbsPeer peer(host, {.num_rails = 1 + (how >> 1 & 1u),
                          .push = push,
                          .side = (how & 4) != 0 ? Side::kConnecting : Side::kAccepting});
    for (int i = 0; i < kMaxSteps && !input.empty() && !host.is_lost(); ++i) {
      const uint8_t then = input.u8();  // several things before the engine looks, or the peer
      step(input, host, peer);
      if ((then & 1) == 0) peer.work();
      if ((then & 2) == 0) peer.hear();
    }
    peer.leave();
  }
  host.check(push);
  return 0;
}
