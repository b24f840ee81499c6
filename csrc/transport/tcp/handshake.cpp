// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/handshake.hpp"

#include <algorithm>

namespace kvxfer::tcp {
namespace {
constexpr size_t kMaxNameBytes = 256;
}

std::optional<Head> decode_handshake_head(ByteView bytes) {
  const auto head = decode_head(bytes, kMaxHandshakeBytes);
  if (!head || head->flags != 0 || head->body_nbytes != 0 || head->request != 0 ||
      head->cancel_count != 0)
    return {};
  return head;
}

Bytes encode_hello(const Hello& hello) {
  return encode_frame({.type = Type::kHello}, [&](Writer& w) {
    w.u16(hello.min_version), w.u16(hello.max_version), w.u64(hello.features);
    w.u32(hello.num_lanes), w.put(hello.self.incarnation), w.put(hello.nonce);
    w.text(std::string_view(hello.self.name).substr(0, kMaxNameBytes));
    w.text(std::string_view(hello.self.address).substr(0, kMaxNameBytes));
    w.text(std::string_view(hello.self.host.boot_id).substr(0, kMaxNameBytes));
    w.u64(hello.self.host.net_ns), w.u64(hello.self.host.pid_ns);
    w.u32(hello.self.host.uid), w.u32(hello.self.host.pid);
  });
}

std::optional<Hello> decode_hello(ByteView control) {
  Reader r(control);
  Hello hello;
  hello.min_version = r.u16(), hello.max_version = r.u16(), hello.features = r.u64();
  hello.num_lanes = r.u32();
  hello.self.incarnation = r.get<Incarnation>();
  hello.nonce = r.get<std::array<std::byte, 32>>();
  hello.self.name = r.text(kMaxNameBytes);
  hello.self.address = r.text(kMaxNameBytes);
  hello.self.host.boot_id = r.text(kMaxNameBytes);
  hello.self.host.net_ns = r.u64(), hello.self.host.pid_ns = r.u64();
  hello.self.host.uid = r.u32(), hello.self.host.pid = r.u32();
  if (!r.finished() || hello.min_version > hello.max_version || hello.num_lanes == 0) return {};
  if (!is_printable(hello.self.name) || !is_printable(hello.self.address)) return {};
  return hello;
}

Keys derive_keys(ByteView secret, const Hello& client, const Hello& server) {
  Bytes salt(client.nonce.begin(), client.nonce.end());
  salt.insert(salt.end(), server.nonce.begin(), server.nonce.end());
  auto key = [&](std::string_view label) {
    return hkdf_sha256(secret, salt, as_bytes_view(label));
  };
  Keys keys{key("kvxfer client key"), key("kvxfer server key"), key("kvxfer session key"), {}};
  const Digest id = key("kvxfer session id");
  std::copy_n(id.begin(), keys.session_id.size(), keys.session_id.begin());
  return keys;
}

Digest client_proof(const Keys& keys, const Transcript& transcript) {
  return hmac_sha256(keys.client, {as_bytes_view("kvxfer client"), transcript.digest()});
}

Digest server_proof(const Keys& keys, const Transcript& transcript) {
  return hmac_sha256(keys.server, {as_bytes_view("kvxfer server"), transcript.digest()});
}

Digest lane_proof(const Digest& session_key, const Key& session_id, uint32_t lane,
                  ByteView binding) {
  const auto number = std::as_bytes(std::span(&lane, 1));
  return hmac_sha256(session_key, {as_bytes_view("kvxfer tcp lane"), session_id, number, binding});
}

Bytes encode_join(const Join& join) {
  return encode_frame({.type = Type::kJoin},
                      [&](Writer& w) { w.put(join.session), w.u32(join.lane), w.put(join.proof); });
}

std::optional<Join> decode_join(ByteView control) {
  Reader r(control);
  Join join;
  join.session = r.get<Key>(), join.lane = r.u32(), join.proof = r.get<Digest>();
  if (!r.finished()) return {};
  return join;
}

}  // namespace kvxfer::tcp
