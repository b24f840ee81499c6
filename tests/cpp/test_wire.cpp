// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Frames and the handshake: round trips, and what a hostile sender may try.
#include <doctest/doctest.h>

#include <random>

#include "engine/control.hpp"
#include "transport/records.hpp"
#include "transport/tcp/handshake.hpp"
#include "transport/tcp/wire.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;

namespace {

StripeHead example(size_t num_targets, bool uniform) {
  StripeHead s;
  s.access.region.id = 7, s.access.lease.id = 9;
  for (size_t i = 0; i < num_targets; ++i)
    s.targets.push_back({i * 4096, static_cast<uint32_t>(uniform ? 512 : 512 + i)});
  for (auto& t : s.targets) s.total_nbytes += t.nbytes;
  s.access.arrival = 3, s.first_target = 5;
  return s;
}

Head stripe_frame(const StripeHead& s, Bytes& frame, ByteView notify = {}) {
  frame = encode_stripe(
      {.type = Type::kStripe, .body_nbytes = static_cast<uint32_t>(s.total_nbytes), .request = 1},
      s, notify);
  const auto head = decode_head(ByteView(frame).first(kHeadBytes), kMaxControlBytes);
  REQUIRE(head);
  return *head;
}

}  // namespace

TEST_CASE("a stripe survives the round trip") {
  for (bool uniform : {true, false})
    for (size_t n : {size_t{0}, size_t{1}, size_t{2}, size_t{kMaxPieces}}) {
      StripeHead s = example(n, uniform);
      s.has_notify = true;
      Bytes frame;
      const Head head = stripe_frame(s, frame, as_bytes_view("hello"));
      StripeHead out;
      REQUIRE(decode_stripe(head, ByteView(frame).subspan(kHeadBytes), out));
      CHECK(out.access.region.id == 7);
      CHECK(out.access.lease.id == 9);
      CHECK(out.first_target == 5);
      CHECK(out.access.arrival == 3);
      CHECK(out.targets.size() == n);
      for (size_t i = 0; i < n; ++i) {
        CHECK(out.targets[i].offset == s.targets[i].offset);
        CHECK(out.targets[i].nbytes == s.targets[i].nbytes);
      }
      CHECK(std::string(reinterpret_cast<const char*>(out.notify.data()), out.notify.size()) ==
            "hello");
    }
}

TEST_CASE("every truncation of a stripe is refused") {
  StripeHead s = example(4, false);
  Bytes frame;
  const Head head = stripe_frame(s, frame, as_bytes_view("note"));
  const ByteView control = ByteView(frame).subspan(kHeadBytes);
  StripeHead out;
  for (size_t n = 0; n < control.size(); ++n)
    CHECK_FALSE(decode_stripe(head, control.first(n), out));
  Bytes longer(control.begin(), control.end());
  longer.push_back(std::byte{0});
  CHECK_FALSE(decode_stripe(head, longer, out));
}

TEST_CASE("a stripe whose descriptors do not add up to its body is refused") {
  StripeHead s = example(4, false);
  Bytes frame;
  Head head = stripe_frame(s, frame);
  StripeHead out;
  ++head.body_nbytes;
  CHECK_FALSE(decode_stripe(head, ByteView(frame).subspan(kHeadBytes), out));
}

// Its lease alone admits it, which says nothing of writing.
TEST_CASE("a notification that brings spans or bytes is refused") {
  StripeHead stripe;
  stripe.access.op = Op::kNotify;
  stripe.access.lease.id = 3;
  stripe.has_notify = true;
  StripeHead out;
  const auto decodes = [&](uint32_t body) {
    const Head head{.type = Type::kStripe, .body_nbytes = body};
    const Bytes frame = encode_stripe(head, stripe, as_bytes_view("x"));
    return decode_stripe(head, ByteView(frame).subspan(kHeadBytes), out);
  };
  CHECK(decodes(0));
  stripe.targets = {{0, 64}};
  stripe.total_nbytes = 64;
  CHECK_FALSE(decodes(64));
  stripe.targets = {};
  CHECK_FALSE(decodes(0));  // the spans might come later
  stripe.total_nbytes = 0;
  stripe.targets = {{0, 0}};
  CHECK_FALSE(decodes(0));
}

TEST_CASE("random control bytes never make the reader overrun") {
  std::mt19937 rng(1);
  StripeHead s = example(8, true);
  Bytes frame;
  const Head head = stripe_frame(s, frame);
  StripeHead out;
  for (int i = 0; i < 20'000; ++i) {
    Bytes control(frame.begin() + kHeadBytes, frame.end());
    for (int flips = 0; flips < 3; ++flips) control[rng() % control.size()] = std::byte(rng());
    control.resize(rng() % (control.size() + 1));
    if (decode_stripe(head, control, out)) CHECK(out.targets.size() <= kMaxPieces);
    (void)decode_failure(control);
    (void)decode_hello(control);
    (void)decode_control(control);
    (void)decode_offers(control);
    (void)decode_token(control);
  }
}

TEST_CASE("a head out of bounds is refused") {
  std::array<std::byte, kHeadBytes> bytes;
  auto decodes = [&](const Head& head, uint32_t limit) {
    write_head(head, bytes.data());
    return decode_head(bytes, limit).has_value();
  };
  CHECK(decodes({.type = Type::kAck, .control_nbytes = 100}, 100));
  CHECK_FALSE(decodes({.type = Type::kAck, .control_nbytes = 101}, 100));
  CHECK(decodes({.type = Type::kStripe, .body_nbytes = kMaxBodyBytes}, 100));
  CHECK_FALSE(decodes({.type = Type::kStripe, .body_nbytes = kMaxBodyBytes + 1}, 100));
  for (size_t i : {0u, 4u, 28u}) {  // magic, version, reserved
    write_head({.type = Type::kAck}, bytes.data());
    bytes[i] ^= std::byte{1};
    CHECK_FALSE(decode_head(bytes, 100));
  }
  CHECK_FALSE(decode_head(ByteView(bytes).first(kHeadBytes - 1), 100));
}

TEST_CASE("a refusal's text is shown as printable data") {
  Failure failure{
      .code = Code::kLease, .span = 3, .expected = 1, .given = 2, .text = "a\x1b[31m\nb"};
  const Bytes frame = encode_failure(Type::kRefuse, 1, failure);
  const auto out = decode_failure(ByteView(frame).subspan(kHeadBytes));
  REQUIRE(out);
  CHECK(out->code == Code::kLease);
  CHECK(out->span == 3);
  CHECK(out->text == "a?[31m?b");
}

TEST_CASE("an outcome's text is shown as printable data, a bounded length of it") {
  std::string text;
  const Failure failure{.code = Code::kLease, .text = "\x1b[2J" + std::string(1000, 'x')};
  OutcomeHead head = outcome_of({}, failure.code, 7, &failure, text);
  CHECK(text.size() == kMaxPeerText);  // what an honest peer sends
  head.nbytes = 8;
  const Completion heard = completion_of(head, 7, failure.text);
  CHECK(heard.failure.text == "?[2J" + std::string(kMaxPeerText - 4, 'x'));
  CHECK(heard.failure.code == Code::kLease);
  CHECK(heard.nbytes == 7);  // of the whole request, whatever it says
}

TEST_CASE("the proofs depend on secret, role, nonces and every byte of the transcript") {
  Hello client, server;
  client.nonce[0] = std::byte{1};
  server.nonce[0] = std::byte{2};
  const Bytes secret(32, std::byte{5}), other(32, std::byte{6});
  Transcript transcript;
  transcript.add(encode_hello(client));
  const Keys keys = derive_keys(secret, client, server);
  const Digest proof = client_proof(keys, transcript);
  CHECK(proof == client_proof(derive_keys(secret, client, server), transcript));
  CHECK(proof != server_proof(keys, transcript));  // a reflected proof is worthless
  CHECK(proof != client_proof(derive_keys(other, client, server), transcript));
  Hello replay = server;
  replay.nonce[0] = std::byte{3};
  CHECK(proof != client_proof(derive_keys(secret, client, replay), transcript));
  client.num_lanes = 2;  // a downgraded offer
  Transcript changed;
  changed.add(encode_hello(client));
  CHECK(proof != client_proof(keys, changed));
  CHECK(keys.client != keys.server);
  const Bytes tls(32, std::byte{7});
  const Digest lane = lane_proof(keys.session, keys.session_id, 1, {});
  CHECK(lane != lane_proof(keys.session, keys.session_id, 2, {}));
  CHECK(lane != lane_proof(keys.session, keys.session_id, 1, tls));  // another socket's
}

TEST_CASE("control messages, offers and tokens survive the round trip") {
  const auto added = decode_control(encode(RegionAdded{{4, {}}, 1 << 20, false, "kv"}));
  REQUIRE(added);
  CHECK(std::get<RegionAdded>(*added).name == "kv");
  CHECK_FALSE(std::get<RegionAdded>(*added).writable);
  CHECK(std::get<RegionAdded>(*added).device == kHostMemory);
  for (const bool writable : {false, true}) {
    const Bytes bytes = encode(RegionAdded{{4, {}}, 1 << 20, writable, "kv", 7});
    const auto on_gpu = std::get<RegionAdded>(*decode_control(bytes));
    CHECK(on_gpu.device == 7);
    CHECK(on_gpu.writable == writable);
    for (size_t n = 0; n < bytes.size(); ++n) CHECK_FALSE(decode_control(ByteView(bytes).first(n)));
  }
  CHECK_FALSE(decode_control(encode(RegionAdded{{4, {}}, 1 << 20, true, "kv", 1 << 20})));
  CHECK(std::get<RegionRemoved>(*decode_control(encode(RegionRemoved{9}))).id == 9);
  CHECK(std::get<Credit>(*decode_control(encode(Credit{64}))).count == 64);
  const Bytes asked = encode(Attach{"verbs", true, Bytes(300)});
  const auto attach = std::get<Attach>(*decode_control(asked));
  CHECK((attach.transport == "verbs" && attach.is_answer && attach.data.size() == 300));
  for (size_t n = 0; n < asked.size(); ++n) CHECK_FALSE(decode_control(ByteView(asked).first(n)));
  CHECK_FALSE(decode_control(encode(Attach{"verbs", false, Bytes(5000)})));
  const auto offers = decode_offers(encode_offers({{"shm", Bytes(16)}, {"x", {}}}));
  REQUIRE(offers);
  CHECK(offers->size() == 2);
  CHECK(offers->at(0).data.size() == 16);
  const Bytes token = encode_token({{}, {3, {}}});
  CHECK(token.size() <= kMaxTokenBytes);
  CHECK(decode_token(token)->lease.id == 3);
  CHECK_FALSE(decode_token(Bytes(token.size())));
}
