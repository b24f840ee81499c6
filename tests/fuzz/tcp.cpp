// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A tcp peer that is let in and then breaks the protocol. The input is a script of what it says on
// which lane, in which pieces, how much it listens, and of requests of ours in between; one thread
// drives the connection. Then: no byte outside a lease, or of the spans of a read, changed; no
// request of ours without exactly one end; no memory that is quiet touched or sent again; whatever
// the engine said is well-formed.
#include "script.hpp"
#include "tcp_peer.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;
using kvxfer::fuzz::FakeStream;
using kvxfer::fuzz::Input;
using kvxfer::fuzz::kKey;
using kvxfer::fuzz::kTheirs;
using kvxfer::fuzz::number;
using kvxfer::fuzz::TcpHost;
using kvxfer::fuzz::TcpPeer;

namespace {

constexpr int kMaxSteps = 64;
constexpr size_t kMaxBody = 64 * 1024;  // said; more is only announced

// The frame as it is said: itself, or with something wrong.
Bytes changed(Input& input, Bytes frame) {
  const uint8_t how = input.u8();
  switch (how < 0xc0 ? 0 : how & 7) {
    case 1:
      frame[input.u16() % frame.size()] ^= std::byte(1u << (how >> 3 & 7));
      break;
    case 2:
      frame[input.u8() % kHeadBytes] = std::byte(input.u8());
      break;
    case 3:
      frame.resize(input.u16() % frame.size());
      break;
    case 4: {
      const uint64_t value = number(input);
      const size_t at = input.u8() % (frame.size() - 7);
      std::memcpy(frame.data() + at, &value, sizeof value);
      break;
    }
    case 5:
      frame.insert(frame.end(), frame.begin(), frame.end());
      break;
    default:
      break;
  }
  return frame;
}

// A few ids that come again and again, so that stripes meet.
uint64_t some_request(Input& input) {
  const uint8_t how = input.u8();
  return how < 0xf0 ? how & 7u : input.u64();
}

void add_body(Bytes& frame, uint64_t nbytes, Code trailer) {
  frame.resize(frame.size() + std::min<uint64_t>(nbytes, kMaxBody), kTheirs);
  std::array<std::byte, kTrailerBytes> end;
  write_trailer(trailer, end.data());
  frame.insert(frame.end(), end.begin(), end.end());
}

// A STRIPE or a READ: spans of one size in equal steps.
Bytes stripe(Input& input, const TcpPeer& peer, Type type) {
  StripeHead said;
  const uint8_t how = input.u8(), region = input.u8();
  said.access.op = type == Type::kRead ? Op::kRead : (how & 3) == 3 ? Op::kNotify : Op::kWrite;
  said.access.region = {region & 3u, kKey};
  said.access.lease = {(region & 0x40) != 0 ? (region >> 2) & 3u : region & 3u, kKey};
  if ((region & 0x80) != 0) said.access.region.key[3] = std::byte{1};
  if ((how & 0x80) != 0) said.access.lease = {};
  const uint8_t what = input.u8();
  if ((what & 1) != 0) said.access.arrival = number(input);
  const size_t few = what >> 4, count = few < 12 ? few & 3 : few == 15 ? kMaxPieces : few * 60;
  Target each{number(input), 1 + static_cast<uint32_t>(number(input) % 2048)};
  const uint64_t step = number(input);
  uint64_t sum = 0;
  for (size_t i = 0; i < count && said.access.op != Op::kNotify; ++i) {
    said.targets.push_back(each);
    each.offset += step, sum += each.nbytes;
  }
  said.total_nbytes = (what & 2) != 0 ? number(input) : sum;
  said.first_target = (what & 4) != 0 ? number(input) : 0;
  said.stripe = how >> 2 & 7;
  Bytes notify;
  said.has_notify = (what & 8) != 0;
  if (said.has_notify) notify.resize(number(input) % (kMaxNotificationBytes + 2));
  const uint32_t body = type == Type::kRead ? 0 : static_cast<uint32_t>(sum);
  Bytes frame = encode_stripe(
      {.type = type,
       .body_nbytes = body,
       .request = some_request(input),
       .cancel_count = (how & 0x40) != 0 ? static_cast<uint32_t>(number(input)) : peer.num_aborts},
      said, notify);
  if (type == Type::kStripe)
    add_body(frame, body,
             (how & 0x20) != 0 ? static_cast<Code>(input.u8() % (kMaxCode + 1)) : Code::kOk);
  return frame;
}

// What was asked for, or almost.
Bytes answer_to_read(Input& input, TcpPeer& peer) {
  const uint8_t how = input.u8();
  TcpPeer::Asked asked;
  if (!peer.reads.empty() && how < 0xe0) {
    const size_t which = how % 8 % peer.reads.size();
    asked = peer.reads[which];
    if ((how & 8) == 0) peer.reads.erase(peer.reads.begin() + static_cast<ptrdiff_t>(which));
  } else {
    asked = {some_request(input), input.u8(), static_cast<uint32_t>(number(input))};
  }
  const uint8_t wrong = input.u8();
  if ((wrong & 1) != 0) asked.nbytes = static_cast<uint32_t>(number(input));
  if ((wrong & 2) != 0) asked.stripe = input.u8();
  if ((wrong & 4) != 0) asked.nbytes = 0;
  Bytes frame = encode_read_data(asked.request, asked.stripe, asked.nbytes);
  add_body(frame, asked.nbytes,
           (wrong & 8) != 0 ? static_cast<Code>(input.u8() % (kMaxCode + 1)) : Code::kOk);
  return frame;
}

uint64_t request_of_ours(Input& input, const TcpPeer& peer) {
  const uint8_t how = input.u8();
  if (how >= 0x80 && !peer.writes.empty()) return peer.writes[how % peer.writes.size()];
  if (how >= 0x40 && !peer.reads.empty()) return peer.reads[how % peer.reads.size()].request;
  return how & 15;
}

Bytes verdict(Input& input, const TcpPeer& peer) {
  const uint8_t how = input.u8();
  const uint64_t id = request_of_ours(input, peer);
  if ((how & 1) != 0) {
    std::vector<uint64_t> ids(1 + (how >> 1 & 3), id);
    for (size_t i = 1; i < ids.size(); ++i) ids[i] = request_of_ours(input, peer);
    return encode_acks(ids);
  }
  const ByteView text = input.take(input.u8());
  return encode_failure(Type::kRefuse, id,
                        {.code = static_cast<Code>(1 + (how >> 1) % kMaxCode),
                         .span = number(input),
                         .text = {reinterpret_cast<const char*>(text.data()), text.size()}});
}

// On all lanes, as an honest peer would, or on some.
void abort(Input& input, TcpPeer& peer) {
  const uint8_t how = input.u8();
  const uint64_t id = some_request(input);
  const uint32_t count =
      (how & 0x80) != 0 ? static_cast<uint32_t>(number(input)) : ++peer.num_aborts;
  for (size_t i = 0; i < peer.num_lanes(); ++i)
    if ((how >> i & 1) == 0) peer.say(i, encode_abort(id, count));
}

Bytes plain(Input& input) {
  const uint8_t how = input.u8();
  switch (how & 7) {
    case 0:
      return encode_plain(Type::kControl,
                          encode(RegionAdded{{how, {}}, number(input), true, "theirs"}));
    case 1:
      return encode_plain(Type::kControl, encode(Credit{static_cast<uint32_t>(number(input))}));
    case 2:
      return encode_plain(Type::kControl, input.take(input.u8()));
    case 3:
      return encode_plain(Type::kReady, {});
    case 4:
      return encode_plain(Type::kPing, {});
    case 5:
      return encode_plain(Type::kPong, {});
    case 6:
      return encode_failure(Type::kError, 0, {.code = Code::kTransport, .text = "\x1b[2J"});
    default: {
      const auto type = static_cast<Type>(how < 0x40 ? 13 : input.u8());
      return encode_plain(type, input.take(how >> 3));
    }
  }
}

// How much it listens and in which pieces what it says arrives; or it hangs up on a lane.
void line(Input& input, TcpPeer& peer) {
  const uint8_t how = input.u8();
  FakeStream& lane = peer.lane(how >> 3);
  switch (how & 7) {
    case 0:
    case 1:
      lane.room = number(input);
      break;
    case 2:
      lane.room = FakeStream::kAll;
      break;
    case 3:
    case 4:
      lane.piece = 1 + number(input) % 100;
      break;
    case 5:
    case 6:
      lane.piece = FakeStream::kAll;
      break;
    default:
      if ((how & 0x80) != 0) return lane.end();
  }
  peer.say(how >> 3, {});
}

// The application: a request, a cancel, a lease or a region that ends; and time.
void engine(Input& input, TcpHost& host, TcpPeer& peer) {
  const uint8_t how = input.u8();
  switch (how & 7) {
    case 4:
      return host.pass_time(int64_t{how} * 10'000'000);
    case 5:
      return host.cancel(peer.connection(), how >> 3);
    case 6:
      return host.revoke(how >> 3);
    case 7:
      return host.deregister(how >> 3);
    default:
      break;
  }
  const auto op = static_cast<Op>((how & 3) % 3);
  static constexpr size_t kCounts[] = {1, 3, 64, 1100, 2200, 300, 0, 7};
  // The engine itself ends a read of nothing.
  const size_t count = std::max<size_t>(kCounts[how >> 3 & 7], op == Op::kRead ? 1 : 0);
  const uint32_t nbytes = 1 + input.u8() % 128;  // in this order, whatever the compiler's is
  const uint64_t remote = number(input) % 4096;
  const auto request = host.next(op, (how & 0x80) != 0, count, nbytes, remote, 1);
  if (!request) return;
  host.post(peer.connection(), request, op != Op::kRead && (how & 0x40) != 0);
}

void step(Input& input, TcpHost& host, TcpPeer& peer) {
  const uint8_t what = input.u8();
  const size_t lane = what >> 4;
  switch (what & 15) {
    case 0:
    case 1:
    case 2:
      return peer.say(lane, changed(input, stripe(input, peer, Type::kStripe)));
    case 3:
      return peer.say(0, changed(input, stripe(input, peer, Type::kRead)));
    case 4:
    case 5:
      return peer.say(lane, changed(input, answer_to_read(input, peer)));
    case 6:
    case 7:
      return peer.say(0, changed(input, verdict(input, peer)));
    case 8:
      return abort(input, peer);
    case 9:
      return peer.say(0, changed(input, plain(input)));
    case 10:
      return peer.say(lane, input.take(input.u8()));
    case 11:
    case 12:
      return line(input, peer);
    default:
      return engine(input, host, peer);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  TcpHost host;
  const uint8_t how = input.u8();
  {
    TcpPeer peer(host, 2 + how % 3);
    for (int i = 0; i < kMaxSteps && !input.empty() && !host.is_lost(); ++i) {
      const bool quiet = (input.u8() & 1) != 0;  // several things before the engine looks
      step(input, host, peer);
      if (!quiet) peer.work();
    }
    peer.leave((how & 0x80) != 0);
  }
  host.check();
  return 0;
}
