// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Registered memory: what the NICs may touch of our regions, and the cache of it by region.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/region.hpp"
#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

// The words that tell a reader whether what it has read was still open; registered to be read.
class WordMemory {
 public:
  WordMemory(const Devices& devices, std::shared_ptr<ExportedWords> words);
  uint64_t address(const WordRef& word) const noexcept {
    return reinterpret_cast<uint64_t>(words_->base()) + uint64_t{word.index} * sizeof(uint64_t);
  }
  const Registration& registration() const noexcept { return registration_; }

 private:
  const std::shared_ptr<ExportedWords> words_;
  const Registration registration_;
};

// Longer runs are cut here, so that a length fits a work request of any device.
inline constexpr uint32_t kMaxRunBytes = 1u << 30;

// A region's registrations, one a piece. Immutable; alive as long as a request of ours or of a peer
// needs it, so that a region that leaves never breaks a queue pair.
class RegionMemory {
 public:
  // `windows`: they may be bound to it. Throws RegistrationError.
  RegionMemory(const Devices& devices, std::shared_ptr<WordMemory> words, const Region& region,
               bool windows);
  ~RegionMemory();

  struct Run {
    std::byte* base;
    uint32_t nbytes;
    const Registration* registration;
  };
  // The first contiguous part of [offset, offset + nbytes), which the caller has checked.
  Run at(uint64_t offset, uint64_t nbytes) const noexcept;
  // All of [offset, offset + nbytes), which the caller has checked, where it lies in one piece;
  // else `registration` is null.
  struct Hull {
    std::byte* base = nullptr;
    const Registration* registration = nullptr;
  };
  Hull hull(uint64_t offset, uint64_t nbytes) const noexcept;
  // False: no peer may read it (share="never"); its bytes go through messages.
  bool readable() const noexcept { return readable_; }
  // Null where there are none.
  const WordMemory* words() const noexcept { return words_.get(); }
  int node() const noexcept { return node_; }  // where its pages are, or kNoNode

 private:
  size_t piece_at(uint64_t offset) const noexcept;
  const std::shared_ptr<WordMemory> words_;
  const bool readable_;
  const std::vector<Piece> pieces_;
  const std::shared_ptr<void> keep_;  // what the pieces lie in
  std::vector<std::unique_ptr<Registration>> registrations_;
  int node_;
};
using RegionMemoryPtr = std::shared_ptr<const RegionMemory>;

// By region. Any thread.
class MemoryTable {
 public:
  // `windows`: they may be bound to what is added.
  void open(Devices devices, bool windows) {
    devices_ = std::move(devices);
    windows_ = windows;
  }
  void add(const Region& region);  // throws RegistrationError
  // Nothing that is asked for from here on gets it; registrations go with the last that uses them.
  void remove(uint64_t region) noexcept;
  RegionMemoryPtr find(uint64_t region) const noexcept;
  void clear() noexcept;

 private:
  Devices devices_;
  bool windows_ = false;
  mutable std::mutex mutex_;  // not held while memory is registered, which may take seconds
  std::unordered_map<uint64_t, RegionMemoryPtr> regions_;
  std::mutex words_mutex_;
  std::weak_ptr<WordMemory> words_;
};

}  // namespace kvxfer::verbs
