// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which of our ports is joined to which of the peer's; pure, so that it is tested without any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "transport/verbs/address.hpp"

namespace kvxfer::verbs {

inline constexpr size_t kMaxRails = 8;  // of one engine, and so of a connection

struct PortPair {
  size_t local = 0, remote = 0;  // indices in the two lists
  Path path;
};
// Each port of either side belongs to one pair at most. First come the pairs within one subnet,
// then what can be reached across; in both the order is that of our list, and each takes the first
// of the peer's that is left. Empty, with the reason of the first port, when none fits.
std::vector<PortPair> pair_ports(const std::vector<PortAddress>& local,
                                 const std::vector<PortAddress>& remote, int local_gid_index,
                                 std::string& reason);

}  // namespace kvxfer::verbs
