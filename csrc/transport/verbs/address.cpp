// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/address.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <bit>

#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {

enum class Family : uint8_t { kIpv4, kIpv6, kLinkLocal };

uint8_t byte(const Gid& gid, size_t i) { return std::to_integer<uint8_t>(gid.raw[i]); }

Family family(const Gid& gid) {
  const bool mapped = std::all_of(gid.raw.begin(), gid.raw.begin() + 10,
                                  [](std::byte b) { return b == std::byte{0}; }) &&
                      byte(gid, 10) == 0xff && byte(gid, 11) == 0xff;
  if (mapped) return Family::kIpv4;
  return byte(gid, 0) == 0xfe && (byte(gid, 1) & 0xc0) == 0x80 ? Family::kLinkLocal : Family::kIpv6;
}

const char* name_of(Family family) {
  return family == Family::kIpv4 ? "IPv4" : family == Family::kIpv6 ? "IPv6" : "link-local";
}

const char* name_of(GidType type) {
  return type == GidType::kInfiniband ? "InfiniBand"
         : type == GidType::kRoceV1   ? "RoCE v1"
                                      : "RoCE v2";
}

// Bits that the two addresses have in common from the left.
int common_prefix(const Gid& a, const Gid& b) {
  int bits = 0;
  for (size_t i = 0; i < a.raw.size(); ++i) {
    const auto differ = static_cast<uint8_t>(byte(a, i) ^ byte(b, i));
    bits += std::countl_zero(differ);
    if (differ != 0) break;
  }
  return bits;
}

// Higher is better; the first bit of the prefix counts less than anything else.
int score(const Gid& local, const Gid& remote) {
  int out = common_prefix(local, remote);
  if (family(local) != Family::kLinkLocal) out += 1000;
  if (local.type == GidType::kRoceV2) out += 10000;
  return out;
}

bool in_one_subnet(const Gid& local, const Gid& remote) {
  switch (family(local)) {
    case Family::kIpv4:
      return common_prefix(local, remote) >= 96 + 24;
    case Family::kIpv6:
      return common_prefix(local, remote) >= 64;
    case Family::kLinkLocal:
      return false;
  }
  return false;
}

std::string list_of(const PortAddress& address) {
  std::string out;
  for (const Gid& gid : address.gids) out += (out.empty() ? "" : ", ") + text_of(gid);
  return out.empty() ? "none" : out;
}

}  // namespace

void encode(const PortAddress& address, Writer& writer) {
  writer.u8(address.infiniband ? 1 : 0);
  writer.u16(address.lid);
  writer.u8(address.mtu);
  const size_t n = std::min(address.gids.size(), kMaxGids);
  writer.u8(static_cast<uint8_t>(n));
  for (size_t i = 0; i < n; ++i) {
    const Gid& gid = address.gids[i];
    writer.u16(gid.index), writer.u8(static_cast<uint8_t>(gid.type)), writer.put(gid.raw);
  }
}

std::optional<PortAddress> decode_address(Reader& reader) {
  PortAddress out;
  out.infiniband = reader.u8() != 0;
  out.lid = reader.u16();
  out.mtu = reader.u8();
  const size_t n = reader.u8();
  if (!reader.ok() || n > kMaxGids) return {};
  for (size_t i = 0; i < n; ++i) {
    Gid gid;
    gid.index = reader.u16();
    const uint8_t type = reader.u8();
    gid.raw = reader.get<std::array<std::byte, 16>>();
    if (!reader.ok() || type > 2) return {};
    gid.type = static_cast<GidType>(type);
    out.gids.push_back(gid);
  }
  return out;
}

std::string text_of(const Gid& gid) {
  char text[INET6_ADDRSTRLEN] = "";
  ::inet_ntop(AF_INET6, gid.raw.data(), text, sizeof text);
  return cat("index ", gid.index, " ", text, " (", name_of(gid.type), ", ", name_of(family(gid)),
             ")");
}

std::optional<Path> choose_path(const PortAddress& local, const PortAddress& remote,
                                int local_index, std::string& reason) {
  if (local.infiniband != remote.infiniband) {
    reason = cat("our port speaks ", local.infiniband ? "InfiniBand" : "Ethernet", ", the peer's ",
                 remote.infiniband ? "InfiniBand" : "Ethernet");
    return {};
  }
  Path best;
  int best_score = -1;
  size_t num_candidates = 0;
  for (const Gid& ours : local.gids) {
    if (local_index >= 0 && ours.index != local_index) continue;
    for (const Gid& theirs : remote.gids) {
      if (ours.type != theirs.type || family(ours) != family(theirs)) continue;
      ++num_candidates;
      if (const int s = score(ours, theirs); s > best_score) {
        best_score = s;
        best.local = ours;
        best.remote = theirs;
      }
    }
  }
  if (local.infiniband) {
    // GIDs of one subnet share their upper half; LIDs are valid within it.
    const bool same_subnet =
        best_score < 0 ||
        std::equal(best.local.raw.begin(), best.local.raw.begin() + 8, best.remote.raw.begin());
    if (local.lid != 0 && remote.lid != 0 && same_subnet && local_index < 0) {
      best.global = false;
      best.one_subnet = true;
      best.reason = cat("LID ", local.lid, " to LID ", remote.lid, ", one subnet");
      return best;
    }
  }
  if (best_score < 0) {
    reason = cat("no pair of GIDs of one type and family",
                 local_index >= 0 ? cat(" with our index ", local_index, " (verbs_gid_index)") : "",
                 ": ours are ", list_of(local), "; the peer's ", list_of(remote));
    return {};
  }
  best.one_subnet = in_one_subnet(best.local, best.remote);
  best.reason = cat(
      "GID ", text_of(best.local), " to ", text_of(best.remote), ", ",
      common_prefix(best.local, best.remote), " common bits, ",
      local_index >= 0 ? "as verbs_gid_index says" : cat("best of ", num_candidates, " pair(s)"));
  return best;
}

}  // namespace kvxfer::verbs
