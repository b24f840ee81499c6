// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/pairing.hpp"

#include <utility>

namespace kvxfer::verbs {

std::vector<PortPair> pair_ports(const std::vector<PortAddress>& local,
                                 const std::vector<PortAddress>& remote, int local_gid_index,
                                 std::string& reason) {
  std::vector<PortPair> out;
  std::vector<bool> local_taken(local.size()), remote_taken(remote.size());
  std::string first_reason;
  for (const bool one_subnet : {true, false})
    for (size_t i = 0; i < local.size(); ++i)
      for (size_t j = 0; j < remote.size() && !local_taken[i]; ++j) {
        if (remote_taken[j]) continue;
        std::string why;
        auto path = choose_path(local[i], remote[j], local_gid_index, why);
        if (first_reason.empty()) first_reason = why;
        if (!path || (one_subnet && !path->one_subnet)) continue;
        local_taken[i] = remote_taken[j] = true;
        out.push_back({i, j, std::move(*path)});
      }
  if (out.empty()) reason = first_reason.empty() ? "one side has no port" : first_reason;
  return out;
}

}  // namespace kvxfer::verbs
