// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine as a verbs connection sees it: with registered memory, and a clock that is put
// forward. The NICs are software that works when a queue is polled (tests/fake_verbs, by_hand=1).
#pragma once

#include <cstdlib>
#include <string>

#include "common/hooks.hpp"
#include "peer_host.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::fuzz {

// One side's own opening of the only device.
inline verbs::Devices open_devices() {
  ::setenv("KVXFER_LIBIBVERBS", KVXFER_FAKE_VERBS_LIBRARY, 1);
  ::setenv("KVXFER_FAKE_VERBS", "by_hand=1", 1);
  std::string reason;
  const auto takes_all = [](const verbs::Device&) { return std::string(); };
  verbs::Devices devices = verbs::Device::open_all({}, takes_all, reason);
  if (devices.empty()) std::fprintf(stderr, "%s\n", reason.c_str());
  FUZZ_CHECK(devices.size() == 1);
  return devices;
}

class VerbsHost final : public PeerHost {
 public:
  VerbsHost() {
    memory.open(devices(), kNever, uint64_t{1} << 30, true);
    regions_[kSplit]->shareable = false;  // pulled into piece by piece, read in messages
    sources_[0]->shareable = false;       // kStagedSource: all in messages
    for (const auto* some : {regions_.data() + 1, regions_.data() + 2, regions_.data() + 3,
                             sources_.data(), sources_.data() + 1}) {
      (*some)->require_lease = true;
      memory.add(**some, [](const verbs::RegionMemory&) { return std::string(); });
    }
  }
  ~VerbsHost() override { memory.clear(); }
  static const verbs::Devices& devices() {
    static const verbs::Devices devices = open_devices();
    return devices;
  }

  void pass_time(int64_t ns) noexcept {
    hooks::skipped_ns.fetch_add(ns, std::memory_order_relaxed);
  }
  void deregister(uint64_t id) noexcept {
    PeerHost::deregister(id);
    if (const auto& region = regions_[id % regions_.size()]) memory.remove(region->id);
  }
  void close_all() noexcept {
    for (uint64_t id = 0; id < leases_.size(); ++id) revoke(id), deregister(id);
  }
  bool all_quiet() const noexcept {
    for (uint64_t id = 1; id < leases_.size(); ++id)
      if (!leases_[id]->gate.quiet() || !regions_[id]->gate.quiet()) return false;
    for (uint64_t id = 0; id < num_ours_; ++id)
      if (!is_quiet(id)) return false;
    return true;
  }

  verbs::MemoryTable memory;
};

}  // namespace kvxfer::fuzz
