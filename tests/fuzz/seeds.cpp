// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Writes the first inputs of a corpus, one valid example of each kind: fuzz_seeds tests/fuzz/corpus
#include <filesystem>
#include <fstream>
#include <string>

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
  s.access = {op, {7, {}}, {9, {}}};
  s.has_notify = !notify.empty();
  s.has_arrival = true;
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
  wire("region_removed", 6, encode(RegionRemoved{3}));
  wire("credit", 6, encode(Credit{64}));
  wire("offers", 7, encode_offers({{"shm", Bytes(20)}, {"verbs", {}}}));
  std::array<std::byte, kTrailerBytes> trailer;
  write_trailer(Code::kCancelled, trailer.data());
  wire("trailer", 8, trailer);
  wire("reader", 9, as_bytes_view("\x08\x00\x01\x02\x03\x1c\x25\x06\x07somebytestoreadfrom"));
  Token token;
  token.lease.id = 4, token.region = 2;
  write("token", "token", encode_token(token));
  return 0;
}
