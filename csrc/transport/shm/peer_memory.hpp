// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's memory as the owner of a destination reaches it: piece by piece it *pulls* the bytes
// into its own. How it does so is what shm and cma differ in.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "common/fd.hpp"
#include "transport/exported_words.hpp"
#include "transport/shm/segment.hpp"
#include "transport/transport.hpp"

namespace kvxfer::shm {

struct Pull {
  std::byte* to = nullptr;
  uint64_t from = 0;  // offset in the peer's region; checked against PeerMemory::nbytes()
  size_t nbytes = 0;
  uint32_t span = 0;  // ordinal within the request, for error messages
};

// What must still be open after the copy, or the bytes may be of somebody else's later use. A write
// watches nothing: who initiated it promised its source until it has ended.
struct Watch {
  WordRef region, lease;
};

// What may be pulled between two looks at gates, slot words and messages.
struct ChunkLimit {
  uint64_t nbytes = 256 * 1024;  // tens of microseconds
  size_t num_pulls = 1023;
};

class PeerMemory {
 public:
  explicit PeerMemory(uint64_t nbytes) : nbytes_(nbytes) {}
  virtual ~PeerMemory() = default;
  uint64_t nbytes() const noexcept { return nbytes_; }
  virtual ChunkLimit limit() const noexcept { return {}; }
  // At most one chunk. A failure names the span; what was pulled before it may be anything.
  virtual std::optional<Failure> pull(std::span<const Pull> pulls, const Watch& watch) noexcept = 0;
  static Failure ended(bool lease);  // a watched word has changed

 private:
  const uint64_t nbytes_;
};

// How one side of a connection shows its memory to the peer, and takes what the peer shows. Both
// travel as messages over the Unix socket, perhaps with a descriptor.
class Reach {
 public:
  virtual ~Reach() = default;
  virtual std::string_view transport() const noexcept = 0;
  virtual std::string describe() const = 0;  // for explain()
  virtual bool can_show(const Region& region) const noexcept = 0;
  virtual Bytes show(const Region& region, int& fd) const = 0;
  virtual Bytes show(const ExportedWords& words, int& fd) const = 0;
  // Empty and `reason` set when it is refused; the connection then ends.
  virtual std::shared_ptr<PeerMemory> take(uint64_t nbytes, ByteView shown, Fd fd,
                                           std::string& reason) = 0;
  virtual bool take_words(ByteView shown, Fd fd, std::string& reason) = 0;
};

// Sealed memfds, mapped to read.
std::unique_ptr<Reach> make_mapped_reach();

// The first lines of a block that is copied next: the hardware's own prefetching stops at the end
// of a page and knows nothing of the next block.
void prefetch_block(const std::byte* to, const std::byte* from, size_t nbytes) noexcept;
// From `base` on, each with the next one's first lines on their way.
void copy_pulls(const std::byte* base, std::span<const Pull> pulls) noexcept;

}  // namespace kvxfer::shm
