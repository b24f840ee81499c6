// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/memlock.hpp"

#include <linux/capability.h>
#include <sys/resource.h>

#include <fstream>

#include "common/error.hpp"

namespace kvxfer::verbs {

Memlock memlock_now() {
  Memlock out;
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    out.limit = limit.rlim_cur;
  std::ifstream in("/proc/self/status");
  for (std::string key; in >> key;) {
    uint64_t value = 0;
    if (key == "VmPin:" && in >> value)
      out.pinned = value * 1024;
    else if (key == "CapEff:" && in >> std::hex >> value >> std::dec)
      out.may_exceed = (value >> CAP_IPC_LOCK & 1) != 0;
    in.clear();
    in.ignore(4096, '\n');
  }
  return out;
}

std::string explain_memlock(const Memlock& memlock, uint64_t nbytes) {
  const char* const short_of =
      "the device has no room for it, or memory is short (MemAvailable in /proc/meminfo, the "
      "container's memory limit)";
  if (!memlock.limit) return cat("the locked-memory limit (ulimit -l) is none, so ", short_of);
  const uint64_t pinned = memlock.pinned.value_or(0);
  const std::string limit =
      cat("the locked-memory limit (ulimit -l) of this process is ", *memlock.limit, " bytes",
          memlock.pinned ? cat(", of which ", pinned, " are pinned") : "");
  if (memlock.may_exceed)
    return cat(limit,
               "; it may exceed that (CAP_IPC_LOCK) unless a container or user namespace "
               "has its own root, so ",
               short_of);
  const bool fits = nbytes <= *memlock.limit && pinned <= *memlock.limit - nbytes;
  if (fits) return cat(limit, ", so ", nbytes, " more are within it: ", short_of);
  return cat(limit, ", and ", nbytes,
             " more are wanted (every rail pins anew); raise it to the size of the pools times the "
             "rails, or to unlimited: `ulimit -l unlimited` in the shell that starts it (the hard "
             "limit is in /etc/security/limits.conf), LimitMEMLOCK=infinity in its systemd unit, "
             "`--ulimit memlock=-1` for its container; or make the pool smaller");
}

}  // namespace kvxfer::verbs
