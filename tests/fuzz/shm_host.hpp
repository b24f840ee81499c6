// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine as a shm connection sees it that one thread drives.
#pragma once

#include "peer_host.hpp"

namespace kvxfer::fuzz {

class ShmHost final : public PeerHost {
 public:
  void unshown(Connection&, const Request&) noexcept override { FUZZ_CHECK(!"only tcp says so"); }
  void quiesced(Request&) noexcept override {
    FUZZ_CHECK(!"a cancel that came while a copier was inside, and there is one thread");
  }
};

}  // namespace kvxfer::fuzz
