// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's checks on an incoming request, the same for every transport.
#include "transport/transport.hpp"

namespace kvxfer {

std::optional<Failure> Landing::check(std::span<const Target> targets, uint64_t first) const {
  if (targets.empty()) return {};
  if (!region) return Failure{.code = Code::kRemoteAccess, .text = "spans without a region"};
  for (size_t i = 0; i < targets.size(); ++i) {
    const Target& t = targets[i];
    if (!region->contains(t.offset, t.nbytes))
      return Failure{.code = Code::kRemoteAccess,
                     .span = first + i,
                     .expected = region->nbytes,
                     .given = t.offset + t.nbytes < t.offset ? ~uint64_t{0} : t.offset + t.nbytes,
                     .text = "out of the region's bounds"};
    if (lease && !lease->covers(t.offset, t.nbytes))
      return Failure{.code = Code::kLease,
                     .span = first + i,
                     .text = cat("bytes ", t.offset, " to ", t.offset + t.nbytes,
                                 " of the region: not covered by the lease")};
  }
  return {};
}

Failure Landing::closed() const {
  if (lease && lease->gate.closed())
    return {.code = Code::kLease,
            .text = lease->expired.load(std::memory_order_relaxed) ? "the lease has expired"
                                                                   : "the lease was revoked"};
  return {.code = Code::kRemoteAccess, .text = "the region was deregistered"};
}

}  // namespace kvxfer
