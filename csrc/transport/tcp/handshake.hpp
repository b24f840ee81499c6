// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The handshake's messages and proofs, without any socket: mutual HMAC over the whole transcript.
#pragma once

#include <optional>
#include <string_view>

#include "common/sha256.hpp"
#include "transport/tcp/wire.hpp"

namespace kvxfer::tcp {

// One text for every mismatch, on both sides: it tells a stranger nothing.
inline constexpr std::string_view kAuthenticationFailed =
    "authentication failed: the two engines do not share a secret; pass the same secret= to both "
    "(without one, both must run as the same user with the same home)";
inline constexpr uint32_t kMaxLanes = 8;  // bulk lanes, beside lane 0

// As decode_head; in a handshake nothing else is said in a head than type and length.
std::optional<Head> decode_handshake_head(ByteView bytes);

struct Hello {
  uint16_t min_version = kVersion, max_version = kVersion;  // the answer: both are the choice
  uint64_t features = 0;
  uint32_t num_lanes = 1;  // asked for; the answer: the choice
  PeerIdentity self;
  std::array<std::byte, 32> nonce{};
};
Bytes encode_hello(const Hello& hello);
std::optional<Hello> decode_hello(ByteView control);

// All bytes of both sides so far, in the order of the exchange.
class Transcript {
 public:
  void add(ByteView bytes) noexcept { hash_.update(bytes); }
  Digest digest() const noexcept {
    Sha256 copy = hash_;
    return copy.finish();
  }

 private:
  Sha256 hash_;
};

// Separate keys and labels, so that a proof cannot be reflected to the side that made it.
struct Keys {
  Digest client{}, server{}, session{};
  Key session_id{};
};
Keys derive_keys(ByteView secret, const Hello& client, const Hello& server);
Digest client_proof(const Keys& keys, const Transcript& transcript);
Digest server_proof(const Keys& keys, const Transcript& transcript);
// What a further socket shows to belong to a session; each (session, lane) is taken once. `binding`
// is Stream::binding() of that socket.
Digest lane_proof(const Digest& session_key, const Key& session_id, uint32_t lane,
                  ByteView binding);

struct Join {
  Key session{};
  uint32_t lane = 0;
  Digest proof{};
};
Bytes encode_join(const Join& join);
std::optional<Join> decode_join(ByteView control);

}  // namespace kvxfer::tcp
