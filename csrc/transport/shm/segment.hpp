// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// OS shared memory: sealed memfds that only their owner can write, and checked mappings of a
// peer's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "common/fd.hpp"

namespace kvxfer::shm {

// An mmap that unmaps itself.
class Mapping {
 public:
  Mapping(std::byte* base, size_t nbytes) noexcept : base_(base), nbytes_(nbytes) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  std::byte* data() const noexcept { return base_; }
  size_t size() const noexcept { return nbytes_; }

 private:
  std::byte* base_;
  size_t nbytes_;
};

struct Segment {
  Fd fd;
  std::shared_ptr<Mapping> mapping;
};

// Memory that we write and peers may map to read: sealed against growing, shrinking and every
// writable mapping made after ours. Throws RegistrationError.
Segment make_owned(const char* name, size_t nbytes);
// Memory that both sides write (rings and slot words; never data): sealed in size only.
Segment make_shared(const char* name, size_t nbytes);

// Maps a peer's segment after checking what only a seal can promise: its size stays (no SIGBUS)
// and, for read-only ones, that nobody but the owner can write. Empty and `reason` set when
// refused.
std::shared_ptr<Mapping> map_peer_readonly(int fd, size_t nbytes, std::string& reason);
std::shared_ptr<Mapping> map_peer_shared(int fd, size_t nbytes, std::string& reason);

}  // namespace kvxfer::shm
