// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's records: a region of memory, a lease on spans of it, and the gate in front of both.
// Memory is written only by its owner, so revoking is the owner's business alone: close the gate
// and wait until its own copiers have left.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/fd.hpp"
#include "common/status.hpp"
#include "common/wait_word.hpp"
#include "common/wire.hpp"
#include "transport/exported_words.hpp"
#include "transport/exposure.hpp"

namespace kvxfer {

using Incarnation = std::array<std::byte, 16>;  // random, one per engine object: who a peer *is*
using Key = std::array<std::byte, 16>;          // random: knowing it is the right to use the thing

// Copiers enter, copy at most one chunk, and leave. Whoever closes the gate waits for the count.
class Gate {
 public:
  // Called once, by the copier or revoker that makes the gate quiet; set before the gate is shared.
  void on_quiet(void (*hook)(void*), void* context) noexcept {
    hook_ = hook;
    context_ = context;
  }

  // seq_cst on both sides: copier counts itself and then looks; the revoker closes and then counts.
  // Whoever is second sees the other, so no copier is inside unseen.
  bool enter() noexcept {
    copiers_.fetch_add(1, std::memory_order_seq_cst);
    if (!closed_.load(std::memory_order_seq_cst)) return true;
    leave();
    return false;
  }
  // Releases the copier's stores to whoever sees the count at zero.
  void leave() noexcept {
    if (copiers_.fetch_sub(1, std::memory_order_seq_cst) == 1) settle();
  }
  void close() noexcept {
    word_.close();  // first: nothing may be called quiet that a reader elsewhere takes for open
    closed_.store(true, std::memory_order_seq_cst);
    settle();
  }
  // The gate's twin for readers in other processes; set before the gate is shared. May be empty.
  void export_word(ExportedWord word) noexcept { word_ = std::move(word); }
  const ExportedWord& word() const noexcept { return word_; }
  bool closed() const noexcept { return closed_.load(std::memory_order_acquire); }
  // Once true, always true, and nothing can be stored behind this gate any more.
  bool quiet() const noexcept { return quiet_.load(std::memory_order_acquire); }
  Woken wait_quiet(int64_t deadline_ns) noexcept {
    for (;;) {
      const uint32_t seen = changed_.read();
      if (quiet()) return Woken::kNotified;
      if (Woken why = changed_.wait(seen, deadline_ns); why != Woken::kNotified) return why;
    }
  }

 private:
  void settle() noexcept {
    if (!closed_.load(std::memory_order_seq_cst) || copiers_.load(std::memory_order_seq_cst) != 0)
      return;
    if (quiet_.exchange(true, std::memory_order_acq_rel)) return;
    changed_.notify_all();
    if (hook_ != nullptr) hook_(context_);
  }

  std::atomic<uint32_t> copiers_{0};
  std::atomic<bool> closed_{false}, quiet_{false};
  WaitWord changed_;
  ExportedWord word_;
  void (*hook_)(void*) = nullptr;
  void* context_ = nullptr;
};

// Where bytes lie: in host memory, or in that of a GPU, by its CUDA ordinal. No CPU may touch the
// latter; its addresses are of no use but to the driver and to a NIC that it is registered with.
inline constexpr int kHostMemory = -1;
inline std::string device_text(int device) {
  return device == kHostMemory ? "cpu" : "cuda:" + std::to_string(device);
}

struct Piece {
  std::byte* base = nullptr;
  uint64_t offset = 0;  // of its first byte in the region's linear offset space
  uint64_t nbytes = 0;
};

// Calls emit(pointer, nbytes) for each contiguous run of [offset, offset + size), which the caller
// has checked against the sum of the pieces.
template <typename Emit>
void resolve_pieces(const std::vector<Piece>& pieces, uint64_t offset, uint64_t size, Emit&& emit) {
  size_t i = 0;
  if (pieces.size() > 1) {
    size_t low = 0, high = pieces.size();
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (pieces[middle].offset <= offset ? low : high) = middle;
    }
    i = low;
  }
  while (size > 0) {
    const Piece& piece = pieces[i++];
    const uint64_t skip = offset - piece.offset;
    const uint64_t n = size < piece.nbytes - skip ? size : piece.nbytes - skip;
    if (n == 0) continue;
    emit(piece.base + skip, static_cast<size_t>(n));
    offset += n;
    size -= n;
  }
}

// What an allocated region is made of, for the user to see.
struct Backing {
  size_t page_nbytes = 0;  // 0: registered, not allocated by us
  double gb_per_s = 0;     // at which its pages were filled
  std::string text;        // both in words, and why no huge pages if there are none
};

struct Region {
  uint64_t id = 0;
  Key key{};
  std::string name;
  uint64_t nbytes = 0;
  bool writable = true;
  bool require_lease = false;
  bool shareable = true;  // false: share="never", no other process may map it
  int device = kHostMemory;
  Backing backing;
  std::vector<Piece> pieces;  // in offset order, no gaps
  // Of the transports that register memory; complete before the region is shown to anybody.
  std::vector<ExposurePtr> exposures;
  Fd memfd;                     // of an allocated region: sealed, so a peer can map it only to read
  std::shared_ptr<void> keep;   // the mapping, or the reference to the caller's buffer
  Gate gate;                    // closed by deregister
  const void* owner = nullptr;  // the engine that it was registered with
  // Own transfers on it that are not quiesced, and whether deregister() is at work. Dekker, so that
  // a submit needs no lock: the one counts itself, then looks at `leaving`; the other sets
  // `leaving`, then looks at the count; all seq_cst.
  std::atomic<uint64_t> uses{0};
  std::atomic<bool> leaving{false};

  template <typename Emit>
  void resolve(uint64_t offset, uint64_t size, Emit&& emit) const {
    resolve_pieces(pieces, offset, size, std::forward<Emit>(emit));
  }
  bool is_on_gpu() const noexcept { return device != kHostMemory; }
  bool contains(uint64_t offset, uint64_t size) const noexcept {
    return size <= nbytes && offset <= nbytes - size;  // no sum that could overflow
  }
};

struct Extent {
  uint64_t begin = 0, end = 0;
};

// The right of a peer to write (or read) some spans for a time. Ends only by an act of the owner.
struct Lease {
  uint64_t id = 0;
  Key key{};
  std::shared_ptr<Region> region;
  std::vector<Extent> extents;      // sorted, merged
  std::optional<Incarnation> peer;  // none: any authenticated peer
  Gate gate;
  std::atomic<int64_t> expires_ns{0};
  std::atomic<bool> expired{false};  // the TTL ended it, not revoke()

  // A bit per arrival index; a set, so that a repeated write cannot count twice.
  std::vector<std::atomic<uint64_t>> arrivals;
  uint64_t num_arrivals = 0;
  std::atomic<uint64_t> num_arrived{0};
  WaitWord arrival_word;

  bool covers(uint64_t offset, uint64_t size) const noexcept {
    size_t low = 0, high = extents.size();
    while (low < high) {  // the last extent that begins at or before offset
      const size_t middle = (low + high) / 2;
      if (extents[middle].begin <= offset)
        low = middle + 1;
      else
        high = middle;
    }
    if (low == 0) return false;
    const Extent& e = extents[low - 1];
    return offset <= e.end && size <= e.end - offset;
  }
  bool arrived(uint64_t index) const noexcept {
    return (arrivals[index / 64].load(std::memory_order_acquire) >> (index % 64)) & 1;
  }
  // Called inside the gate, after the bytes: the release publishes them to who sees the bit.
  void arrive(uint64_t index) noexcept {
    const uint64_t bit = uint64_t{1} << (index % 64);
    if ((arrivals[index / 64].fetch_or(bit, std::memory_order_release) & bit) == 0)
      num_arrived.fetch_add(1, std::memory_order_release);
    arrival_word.notify_all();
  }
};

}  // namespace kvxfer
