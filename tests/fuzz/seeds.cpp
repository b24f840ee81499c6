// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Writes the first inputs of a corpus, one valid example of each kind: fuzz_seeds tests/fuzz/corpus
#include <array>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <string>
#include <vector>

#include "engine/control.hpp"
#include "fuzz.hpp"
#include "transport/tcp/handshake.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;

namespace {

std::filesystem::path folder;

void write(const std::string& target, const std::string& name, ByteView bytes) {
  std::filesystem::create_directories(folder / target);
  std::ofstream file(folder / target / name, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  FUZZ_CHECK(file.good());
}

// The first byte is wire.cpp's choice of a decoder.
void wire(const std::string& name, uint8_t decoder, ByteView payload) {
  Bytes bytes{std::byte{decoder}};
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  write("wire", name, bytes);
}

ByteView control_of(const Bytes& frame) { return ByteView(frame).subspan(kHeadBytes); }

void stripe(const std::string& name, Op op, size_t num_targets, bool uniform, ByteView notify) {
  StripeHead s;
  s.access = {op, {7, {}}, {9, {}}, {}};
  s.has_notify = !notify.empty();
  s.access.arrival = 0;
  for (size_t i = 0; i < num_targets; ++i)
    s.targets.push_back({i * 4096, static_cast<uint32_t>(uniform ? 512 : 512 + i)});
  for (const Target& t : s.targets) s.total_nbytes += t.nbytes;
  const auto type = op == Op::kRead ? Type::kRead : Type::kStripe;
  const uint32_t body = op == Op::kRead ? 0 : static_cast<uint32_t>(s.total_nbytes);
  Bytes bytes;
  Writer w(bytes);
  w.u32(body);
  const Bytes frame = encode_stripe({.type = type, .body_nbytes = body}, s, notify);
  w.raw(control_of(frame));
  wire(name, type == Type::kRead ? 2 : 1, bytes);
}

void script(const std::string& target, const std::string& name,
            std::initializer_list<uint8_t> bytes) {
  write(target, name, std::as_bytes(std::span(bytes.begin(), bytes.size())));
}

// Steps of handshake.cpp: a role, then who does what.
void handshakes() {
  script("handshake", "connect", {0, 0, 1});
  script("handshake", "connect_in_parts", {0, 1, 1});
  script("handshake", "accept", {0x41});
  const std::array<uint8_t, 2> as_it_is = {0, 0};  // unchanged, in one part
  Bytes session{std::byte{0x42}};
  const auto add = [&](std::initializer_list<uint8_t> bytes) {
    for (uint8_t b : bytes) session.push_back(std::byte(b));
    for (uint8_t b : as_it_is) session.push_back(std::byte(b));
  };
  session.insert(session.end(), {std::byte{0}, std::byte{1}, std::byte{3}});
  session.resize(session.size() + 32);  // HELLO's nonce
  add({});
  add({6, 1});           // AUTH
  add({6 * 2 + 1, 6});   // JOIN lane 1 on another socket
  add({6 * 2 + 2, 12});  // and lane 2
  write("handshake", "strangers", session);
}

// Steps of shm.cpp, each after a byte that is odd where the engine does not look in between.
void shared_memory() {
  const std::initializer_list<uint8_t> announce = {0, 11, 5, 0, 5, 0x40, 0x00, 0x10};
  const auto after_announce = [&](const std::string& name, std::initializer_list<uint8_t> more) {
    std::vector<uint8_t> bytes(announce);
    bytes.insert(bytes.end(), more);
    write("shm", name, std::as_bytes(std::span(bytes)));
  };
  script("shm", "staged_write", {0, 2, 0, 1, 8, 8, 0, 0, 1, 0, 0, 0, 63, 0, 7, 0, 8, 63});
  after_announce("mapped_write", {0, 2, 0, 1, 8, 12, 0, 5, 1, 0, 0, 0, 63});
  script("shm", "long_write", {0, 4, 0xdc, 5, 3, 4, 8, 0});
  script("shm", "read_of_ours", {0, 2, 1, 1, 8, 0, 0, 0, 2, 0, 0, 32, 32, 0, 1, 0, 1});
  script("shm", "granted_to_the_peer", {0, 2, 1, 2, 8, 4, 0, 0, 2, 0, 0, 32, 32, 0, 5, 4, 8});
  after_announce("granted_to_us", {0, 14, 0x09, 0x20, 0, 0, 8, 1, 8, 5, 3});
  script("shm", "answered", {0, 14, 0x08, 0x20, 0, 0, 1, 0, 8, 0x80, 8, 0x20});
  script("shm", "notification", {0, 2, 2, 1, 8, 1, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0});
  script("shm", "positions", {0, 10, 0, 0x41, 0, 1, 0, 0, 0, 10, 0x83, 63, 0, 0});
}

// Steps of tcp.cpp: first how many lanes; then each after a byte that is odd where the engine does
// not look in between. The low half of a step's own byte says what, the high half on which lane.
void frames() {
  using Step = std::vector<uint8_t>;
  const auto write_script = [](const std::string& name, std::initializer_list<Step> steps) {
    Step bytes{1};
    for (const Step& step : steps) {
      bytes.push_back(0);
      bytes.insert(bytes.end(), step.begin(), step.end());
    }
    write("tcp", name, std::as_bytes(std::span(bytes)));
  };
  const Step write_64{0x10, 0, 1, 0x10, 0, 63, 0, 1, 0},
      half{0x10, 0, 1, 0x12, 0, 63, 0, 0x40, 128, 0, 1, 0};
  const Step other_half{0x20, 0, 1, 0x12, 63, 63, 0, 0x40, 128, 0, 1, 0};
  const Step not_granted{0x10, 0, 1, 0x10, 0x44, 0, 1, 63, 0, 2, 0},
      padding{0x10, 0x20, 1, 0x10, 0, 63, 0, 3, 10, 0};
  const Step note{0x00, 3, 2, 0x09, 5, 0, 0, 0, 9, 4, 0}, many{0x20, 0, 2, 0xf0, 0, 7, 8, 5, 0};
  const Step read_64{0x03, 0, 2, 0x10, 0, 63, 0, 6, 0},
      read_not_granted{0x03, 0, 2, 0x10, 0x44, 0, 1, 63, 0, 7, 0};
  const Step our_write{13, 0x08, 31, 0}, our_long_write{13, 0x20, 127, 0},
      our_read{13, 0x09, 31, 0};
  const Step our_long_read{13, 0x21, 127, 0}, our_note{13, 0x42, 0, 0}, cancel{13, 5},
      revoke{13, 0x0e};
  const Step ack{6, 1, 0x80, 0}, refuse{6, 0, 0x80, 0, 1, 0}, data{0x14, 0, 0, 0}, aborts{8, 0, 1};
  const Step deaf{11, 0x08, 0}, hears{11, 0x0a}, in_pieces{11, 0x0b, 9}, ping{9, 4, 0},
      second{13, 100};

  write_script("write", {write_64});
  write_script("write_in_pieces", {in_pieces, write_64, {0}, {0}});
  write_script("two_stripes", {half, other_half});
  write_script("many_spans", {many});
  write_script("not_granted", {not_granted, aborts});
  write_script("padding", {padding, aborts});
  write_script("notification", {note});
  write_script("aborted_write", {half, aborts, other_half});
  write_script("revoked_write", {in_pieces, half, revoke, other_half});
  write_script("read", {read_64});
  write_script("read_not_granted", {read_not_granted});
  write_script("read_revoked", {deaf, read_64, revoke, hears});
  write_script("our_write", {our_write, ack});
  write_script("our_long_write", {our_long_write, ack});
  write_script("our_write_refused", {our_write, refuse});
  write_script("our_write_cancelled", {deaf, our_long_write, cancel, hears, ack});
  const Step deaf_too{11, 0x10, 0}, hears_too{11, 0x12};
  write_script("our_write_refused_in_the_middle",
               {deaf, deaf_too, our_long_write, {6, 0, 0, 0, 1, 0}, hears, hears_too});
  write_script("our_read", {our_read, data});
  write_script("our_long_read", {our_long_read, data, data, data});
  write_script("our_read_cancelled", {our_read, cancel, data});
  write_script("our_read_refused", {our_read, {6, 0, 0x40, 0, 1, 0}, data});
  write_script("our_notification", {our_note, ack});
  write_script("control", {{9, 0, 63, 0}, {9, 1, 5, 0}, ping, {9, 3, 0}, {9, 5, 0}});
  write_script("silence", {our_write, second, second, ping});
}

// Steps of verbs.cpp: first whether there are pushes (1), two rails (2), and who had asked (4);
// then each after a byte that says whether the engine (1) or the peer (2) does not look in between.
void rdma() {
  using Bytes8 = std::vector<uint8_t>;
  const auto write_script = [](const std::string& name, uint8_t setup,
                               std::initializer_list<Bytes8> steps) {
    Bytes8 bytes{setup};
    for (const Bytes8& step : steps) bytes.insert(bytes.end(), step.begin(), step.end());
    write("verbs", name, std::as_bytes(std::span(bytes)));
  };
  constexpr uint8_t kTicket = 0x08;                  // slot 0, generation 1: the first
  const Bytes8 two_segments{0, 2, 0x10, 0, 32, 32};  // rows, how many, where, whither
  const auto request = [&](uint8_t op, uint8_t region, Bytes8 flags, bool has_segments = true) {
    Bytes8 out{0, 1, op, region, kTicket};
    out.insert(out.end(), flags.begin(), flags.end());
    if (has_segments)
      out.insert(out.end(), two_segments.begin(), two_segments.end());
    else
      out.push_back(0);
    return out;
  };
  const Bytes8 outcome{0, 6, 0, kTicket, 0x40, 96, 0}, grant{0, 7, 0, kTicket, 0, 0};
  const Bytes8 our_read{0, 17, 0x09, 31, 0}, our_write{0, 17, 0x08, 31, 0};  // 3 spans of 32
  const Bytes8 our_pushed{0, 17, 0x08, 0x80 | 31, 0}, cancel{0, 17, 5};
  const auto event = [](uint8_t what, uint8_t which) {
    return Bytes8{0, 15, static_cast<uint8_t>(what | which << 3)};
  };
  const auto told = [](uint8_t what, uint8_t rail = 0) { return Bytes8{0, 9, what, rail, 0}; };
  const auto about = [](uint8_t what) { return Bytes8{0, 4, what, kTicket}; };

  write_script("pulled_write", 0, {request(0, 2, {0})});
  write_script("pulled_write_in_pieces", 0, {request(0, 1, {2, 3})});
  write_script("notification", 0, {request(2, 2, {1, 5}, false)});
  write_script("staged_write", 0, {request(0, 2, {4}), {0, 5, 0, kTicket, 0x86}});
  write_script("granted_read", 0, {request(1, 2, {0}), about(2)});
  write_script("read_in_messages", 0, {request(1, 1, {0})});
  write_script("aborted_write", 0, {event(0, 0), request(0, 2, {0}), about(1)});
  write_script("revoked_write", 0,
               {event(0, 0), request(0, 2, {0}), {0, 17, 0x16}, event(6, 2), event(3, 0)});
  write_script("our_read", 4, {our_read, grant});
  write_script("our_read_held", 0, {event(0, 0), our_read, grant, {0, 15, 2, 2}});
  write_script("our_read_held_and_cancelled", 0, {event(0, 0), our_read, grant, cancel});
  write_script("our_read_in_messages", 0,
               {{0, 17, 0x89, 31, 0}, {0, 5, 1, kTicket, 0x40, 96, 0}, outcome});
  write_script("our_write", 0, {our_write, outcome});
  write_script("our_write_in_messages", 0, {{0, 17, 0x88, 31, 0}, outcome});
  write_script("our_write_after_all_in_messages", 0, {our_write, about(3), outcome});
  write_script("our_long_write", 0, {{0, 17, 0x20, 3, 0}, about(0), about(0), outcome});
  write_script("our_long_read", 0, {{0, 17, 0x21, 3, 0}, grant, grant, grant});
  const auto fails = [](uint8_t which, uint8_t status) {
    return Bytes8{0, 15, static_cast<uint8_t>(4 | which << 3), status};
  };
  write_script("our_write_refused", 0, {our_write, {0, 6, 1, kTicket, 0, 5, 1}});
  write_script("our_read_pulled_again", 0, {fails(0, 0), our_read, grant, told(1), told(3)});
  write_script("our_read_fails", 0, {fails(0, 1), our_read, grant, told(1), told(3)});
  write_script("write_pulled_again", 0, {fails(0, 0), request(0, 2, {0}), told(1), told(3)});
  write_script("our_notification", 0, {{0, 17, 0x42, 0, 0}, outcome});
  write_script("our_write_cancelled", 0, {our_write, cancel, event(6, 1), told(2), told(1)});

  const Bytes8 window{0, 10, 0x11, 0, 0x20, 0, 1, 0x8c}, window_key{0, 10, 0x13, 0, 1, 0};
  const Bytes8 sink_ready{0, 10, 7, 0, 1, 1, 32}, no_window{0, 10, 0x14};
  write_script("our_pushed_write", 1,
               {our_pushed, told(5), window, sink_ready, window_key, outcome});
  write_script("our_pushed_write_revoked", 1,
               {our_pushed, told(5), window, sink_ready, window_key, {0, 10, 0x15}, outcome});
  write_script("our_pushed_write_broken", 1,
               {our_pushed,
                told(5),
                event(0, 3),
                window,
                sink_ready,
                window_key,
                told(5),
                {0, 10, 0x17, 0, 2, 1, 32, kTicket, 0}});
  write_script("no_window", 1, {our_pushed, no_window, outcome});
  const Bytes8 next_key{0, 10, 0x13, 0, 2, 0}, next_ready{0, 10, 7, 0, 2, 1, 32};
  for (const uint8_t status : {0, 1}) {
    const std::string name = status == 0 ? "our_pushed_write_lost" : "our_pushed_write_denied";
    write_script(name, 1,
                 {our_pushed, told(5), window, sink_ready, fails(3, status), window_key, told(5),
                  next_ready, next_key, outcome});
    write_script(name + "_and_cancelled", 1,
                 {our_pushed, told(5), window, sink_ready, fails(3, status), window_key, cancel,
                  event(6, 1), told(5), next_ready, next_key, outcome});
  }
  write_script("our_pushed_write_held_and_cancelled", 1,
               {our_pushed, told(5), window, sink_ready, event(0, 3), window_key, cancel,
                event(6, 1), told(5), next_ready});
  const Bytes8 ask{0, 10, 0x20}, pushed{0, 12, 0, kTicket, 0, 0, 0x86};
  write_script("pushed_write", 1, {ask, told(6), request(0, 2, {8}), pushed});
  write_script("pushed_write_revoked", 1,
               {ask, told(6), request(0, 2, {8}), {0, 17, 0x16}, {0, 10, 0x26}, pushed});
  write_script("pushed_write_never_drained", 1,
               {ask, told(6), {0, 17, 0x16}, event(6, 2), pushed, event(6, 2), pushed});
  write_script("new_sink", 1, {ask, told(6), told(4), told(6), request(0, 2, {8}), pushed});

  write_script("new_source", 0, {told(1), told(3), request(0, 2, {0})});
  write_script("new_puller", 0, {told(0), told(2)});
  write_script("messages_move", 2, {event(5, 2), {0, 13, 3}, request(2, 2, {1, 5}, false)});
  write_script("messages_move_for_the_peer", 2, {{0, 13, 1, 2}, request(2, 2, {1, 5}, false)});
  write_script("new_control", 3, {event(5, 2), {0, 13, 3}, told(0x87), told(1), told(3)});

  // What once went wrong (tests/cpp/test_verbs_hostile.cpp).
  write_script("grant_after_bytes", 0, {our_read, {0, 5, 1, kTicket, 32}, grant});
  write_script("bytes_after_grant", 0,
               {our_read, {1, 7, 0, kTicket, 0, 0}, {0, 5, 1, kTicket, 32}});
  write_script("end_of_a_read_that_reads", 0, {event(0, 0), our_read, grant, outcome});
  write_script("end_of_the_words", 0, {event(0, 0), our_read, grant, {0, 15, 2, 2}, outcome});
  write_script("end_of_a_cancelled_read", 0, {event(0, 0), our_read, grant, cancel, outcome});
  write_script("end_of_an_unsent_write", 1, {our_pushed, outcome, no_window});
  write_script("more_of_an_unsent_write", 1, {our_pushed, about(0), no_window});
  write_script("messages_for_an_unsent_write", 1, {our_pushed, about(3), no_window});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  folder = argv[1];
  wire("head", 0, ByteView(encode_abort(5, 2)).first(kHeadBytes));
  stripe("stripe_uniform", Op::kWrite, 3, true, as_bytes_view("hello"));
  stripe("stripe_raw", Op::kWrite, 3, false, {});
  stripe("stripe_notify", Op::kNotify, 0, false, as_bytes_view("hello"));
  stripe("read_uniform", Op::kRead, 4, true, {});
  stripe("read_raw", Op::kRead, 2, false, {});
  wire("refuse", 3,
       control_of(encode_failure(
           Type::kRefuse, 1, {.code = Code::kLease, .span = 3, .given = 9, .text = "revoked"})));
  Hello hello;
  hello.self.name = "a", hello.self.address = "127.0.0.1:1", hello.self.host.boot_id = "boot";
  wire("hello", 4, control_of(encode_hello(hello)));
  wire("join", 5, control_of(encode_join({.lane = 1})));
  wire("region_added", 6, encode(RegionAdded{{3, {}}, 4096, true, "kv"}));
  wire("gpu_region_added", 6, encode(RegionAdded{{3, {}}, 4096, true, "kv", 1}));
  wire("region_removed", 6, encode(RegionRemoved{3}));
  wire("credit", 6, encode(Credit{64}));
  wire("attach", 6, encode(Attach{"verbs", true, Bytes(80)}));
  wire("offers", 7, encode_offers({{"shm", Bytes(20)}, {"verbs", {}}}));
  std::array<std::byte, kTrailerBytes> trailer;
  write_trailer(Code::kCancelled, trailer.data());
  wire("trailer", 8, trailer);
  wire("reader", 9, as_bytes_view("\x08\x00\x01\x02\x03\x1c\x25\x06\x07somebytestoreadfrom"));
  Token token;
  token.lease.id = 4;
  write("token", "token", encode_token(token));
  handshakes();
  shared_memory();
  frames();
  rdma();
  return 0;
}
