// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/process_state.hpp"

#include <fstream>

namespace kvxfer {

std::string describe_stopped(const HostIdentity& peer, const HostIdentity& self) {
  if (peer.boot_id != self.boot_id || peer.pid_ns != self.pid_ns) return {};
  std::ifstream file(cat("/proc/", peer.pid, "/stat"));
  std::string line;
  if (!std::getline(file, line)) return {};
  // pid (name) state ...: the name may hold spaces and parentheses, so the last one counts.
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos || name_end + 2 >= line.size()) return {};
  const char state = line[name_end + 2];
  if (state != 'T' && state != 't') return {};
  return cat("its process ", peer.pid, " is stopped (state ", state, ")");
}

}  // namespace kvxfer
