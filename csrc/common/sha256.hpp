// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4), HMAC (RFC 2104) and HKDF (RFC 5869), for the handshake only: a few hundred
// bytes per connection, so the plain version is fast enough and no crypto library is needed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "common/wire.hpp"

namespace kvxfer {

using Digest = std::array<std::byte, 32>;

class Sha256 {
 public:
  Sha256& update(ByteView data) noexcept;
  Digest finish() noexcept;

 private:
  void block(const std::byte* data) noexcept;
  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> pending_{};
  size_t num_pending_ = 0;
  uint64_t nbytes_ = 0;
};

Digest sha256(ByteView data) noexcept;
Digest hmac_sha256(ByteView key, std::initializer_list<ByteView> parts) noexcept;
// Extract and expand, 32 bytes: one key per (secret, salt, label).
Digest hkdf_sha256(ByteView secret, ByteView salt, ByteView label) noexcept;
// Constant time: how long it takes tells nothing about where they differ.
bool equal_constant_time(ByteView a, ByteView b) noexcept;

}  // namespace kvxfer
