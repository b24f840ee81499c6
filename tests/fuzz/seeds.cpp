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
  token.lease.id = 4, token.region = 2;
  write("token", "token", encode_token(token));
  handshakes();
  shared_memory();
  return 0;
}
