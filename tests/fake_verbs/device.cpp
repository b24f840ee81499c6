// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace fake_verbs {
namespace {

bool is_link_local(const ibv_gid& gid) { return gid.raw[0] == 0xfe && gid.raw[1] == 0x80; }
bool is_ipv4(const ibv_gid& gid) {
  static constexpr uint8_t kMapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(gid.raw, kMapped, sizeof kMapped) == 0;
}

// 10.77.RAIL.HOST, fd00:77:0:RAIL::HOST and fe80::RAIL:HOST.
Gid make_gid(GidKind kind, int rail, int host) {
  Gid out;
  uint8_t* raw = out.gid.raw;
  const auto r = static_cast<uint8_t>(rail), h = static_cast<uint8_t>(host);
  switch (kind) {
    case GidKind::kEmpty:
      return out;
    case GidKind::kLinkLocalV1:
    case GidKind::kLinkLocalV2:
      raw[0] = 0xfe, raw[1] = 0x80, raw[13] = r, raw[15] = h;
      break;
    case GidKind::kIpv4V1:
    case GidKind::kIpv4V2:
      raw[10] = raw[11] = 0xff, raw[12] = 10, raw[13] = 77, raw[14] = r, raw[15] = h;
      break;
    case GidKind::kIpv6V1:
    case GidKind::kIpv6V2:
      raw[0] = 0xfd, raw[3] = 0x77, raw[7] = r, raw[15] = h;
      break;
  }
  const bool v1 =
      kind == GidKind::kLinkLocalV1 || kind == GidKind::kIpv4V1 || kind == GidKind::kIpv6V1;
  out.type = v1 ? IBV_GID_TYPE_ROCE_V1 : IBV_GID_TYPE_ROCE_V2;
  return out;
}

}  // namespace

bool Gid::empty() const {
  return std::all_of(std::begin(gid.raw), std::end(gid.raw), [](uint8_t b) { return b == 0; });
}

bool Gid::reaches(const ibv_gid& other) const {
  if (is_ipv4(gid) != is_ipv4(other) || is_link_local(gid) != is_link_local(other)) return false;
  // The rail is part of the prefix that is compared; a link-local address has it further back.
  const size_t prefix = is_ipv4(gid) ? 15 : is_link_local(gid) ? 14 : 8;
  return std::memcmp(gid.raw, other.raw, prefix) == 0;
}

Device::Device(const Plan& plan, int i) : ibv_device{}, index(i), infiniband(plan.infiniband) {
  node_type = IBV_NODE_CA;
  transport_type = IBV_TRANSPORT_IB;
  guid = 0x0077'0000'0000'0000u | static_cast<uint64_t>(plan.host) << 16 | static_cast<uint64_t>(i);
  std::snprintf(ibv_device::name, sizeof ibv_device::name, "fake%d", i);
  std::snprintf(dev_name, sizeof dev_name, "uverbs%d", i);
  std::snprintf(dev_path, sizeof dev_path, "/sys/class/infiniband_verbs/uverbs%d", i);
  std::snprintf(ibdev_path, sizeof ibdev_path, "%s/fake%d",
                plan.sysfs.empty() ? "/sys/class/infiniband" : plan.sysfs.c_str(), i);
  for (int number = 1; number <= plan.ports; ++number) {
    Port& port = ports.emplace_back();
    port.device = this;
    port.number = number;
    port.rail = i * plan.ports + number - 1;
    port.up = std::find(plan.down.begin(), plan.down.end(), port.rail) == plan.down.end();
    if (infiniband) {
      port.lid = static_cast<uint16_t>(port.rail << 8 | plan.host);
      Gid gid = make_gid(GidKind::kLinkLocalV2, port.rail, plan.host);
      gid.type = IBV_GID_TYPE_IB;
      port.gids.push_back(gid);
    } else {
      for (const GidKind kind : plan.gids)
        port.gids.push_back(make_gid(kind, port.rail, plan.host));
    }
  }
}

}  // namespace fake_verbs
