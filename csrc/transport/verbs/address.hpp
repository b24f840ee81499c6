// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Addresses of a port and which pair of them two ports use; pure, so that it is tested without any.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/wire.hpp"

namespace kvxfer::verbs {

enum class GidType : uint8_t { kInfiniband = 0, kRoceV1 = 1, kRoceV2 = 2 };

struct Gid {
  uint16_t index = 0;  // in its port's table
  GidType type = GidType::kRoceV2;
  std::array<std::byte, 16> raw{};
};

// What a peer must know of a port to reach it; travels in the offer.
struct PortAddress {
  bool infiniband = false;
  uint16_t lid = 0;
  uint8_t mtu = 0;  // enum ibv_mtu
  std::vector<Gid> gids;
};
inline constexpr size_t kMaxGids = 12;  // of one port that are offered: those of eight fit an offer
void encode(const PortAddress& address, Writer& writer);
std::optional<PortAddress> decode_address(Reader& reader);

std::string text_of(const Gid& gid);

struct Path {
  bool global = true;       // false: by LID alone, within one InfiniBand subnet
  bool one_subnet = false;  // as far as addresses tell: see choose_path()
  Gid local, remote;
  std::string reason;  // for explain()
};
// The pair by rule: RoCE v2, one family, the longest common prefix, link-local only where there is
// nothing else. One subnet: the first 24 bits of IPv4, the first 64 of other GIDs are the same;
// link-local addresses are so everywhere, and tell nothing. `local_index`: the user's choice of
// ours, or -1. Empty, with the reason, when the two ports cannot speak to each other.
std::optional<Path> choose_path(const PortAddress& local, const PortAddress& remote,
                                int local_index, std::string& reason);

}  // namespace kvxfer::verbs
