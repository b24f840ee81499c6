// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Reading another process's memory, and knowing that it still is the process we mean.
//
// A pid says little: it is given again after a death, and survives exec. So every call ends with
// one more element, the 16-byte incarnation that the peer keeps at an address it told us. One call
// uses one address space: where the word is right, all of the batch came from the peer.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "transport/shm/peer_memory.hpp"

namespace kvxfer::cma {

inline constexpr size_t kMaxElements = 1024;              // IOV_MAX
inline constexpr size_t kMaxCallBytes = size_t{1} << 20;  // cancel is looked at in between

class Peer {
 public:
  Peer(int pid, uint64_t address, const Incarnation& incarnation)
      : pid_(pid), address_(address), incarnation_(incarnation) {}

  // Reads the incarnation alone.
  std::optional<Failure> identify() const noexcept;
  // Fills `local` from `remote` (at most kMaxElements - 3 each, the same sum), then looks at the
  // incarnation and the watched words, all in one call. `done`: bytes that came, also on failure;
  // they are the peer's only when nothing failed.
  std::optional<Failure> read(std::span<iovec> local, std::span<iovec> remote,
                              const shm::Watch& watch, size_t& done) const noexcept;

  // Where the peer's words are, which is said once; progress thread only, before the first watch.
  bool set_words(uint64_t address) noexcept {
    return std::exchange(words_, address) == 0 && address != 0;
  }

 private:
  int pid_;
  uint64_t address_;
  Incarnation incarnation_;
  uint64_t words_ = 0;
};

std::unique_ptr<shm::Reach> make_reach(std::shared_ptr<Peer> peer);

}  // namespace kvxfer::cma
