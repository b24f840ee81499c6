// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Registered memory: what the NICs may touch of our regions, and the table of it by region.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/region.hpp"
#include "transport/verbs/device.hpp"
#include "transport/verbs/preference.hpp"
#include "transport/verbs/range_cache.hpp"
#include "transport/verbs/registrar.hpp"

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

// A region's registrations, one a piece, or a part of a long one. Immutable once it is complete;
// alive as long as a request of ours or of a peer needs it, so that a region that leaves never
// breaks a queue pair.
class RegionMemory {
 public:
  // Nothing is registered yet. `max_part`: bytes of one registration; `windows`: they
  // may be bound to it.
  RegionMemory(std::shared_ptr<WordMemory> words, const Region& region, uint64_t max_part,
               bool windows);
  ~RegionMemory();

  // Registers every part, or takes it from the cache. Throws RegistrationError or what `step`
  // throws, and then nothing is left of it.
  void complete(const Devices& devices, RangeCache& cache, const Registration::Step& step);
  // The region goes, or does not come: nobody else is given what it has.
  void leave(RangeCache& cache) noexcept;

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
  const Preference& preference() const noexcept { return preference_; }
  bool is_on_gpu() const noexcept { return device_ != kHostMemory; }
  std::string how() const;  // it was registered, in words; empty: as host memory is

 private:
  Range range_of(size_t part) const noexcept;
  RegistrationPtr register_part(size_t part, const Devices& devices,
                                const Registration::Step& step) const;
  size_t part_at(uint64_t offset) const noexcept;

  const std::shared_ptr<WordMemory> words_;
  const std::string name_;
  const bool readable_, shares_;
  const int access_, device_;
  std::vector<Piece> parts_;
  const std::shared_ptr<void> keep_;  // what the parts lie in
  std::vector<RegistrationPtr> registrations_;
  Preference preference_;
};
using RegionMemoryPtr = std::shared_ptr<const RegionMemory>;

// By region. Any thread.
class MemoryTable {
 public:
  // `background`: with more bytes to register than that, over all devices, a region is registered
  // by a thread of the table. `windows`: they may be bound to what is added.
  void open(Devices devices, uint64_t background, uint64_t max_part, bool windows);
  // Small ones are registered when this returns, or have failed; see region.exposures. `describe`
  // has the words about one that is done.
  using Describe = std::function<std::string(const RegionMemory&)>;
  void add(Region& region, Describe describe);
  // Nothing that is asked for from here on gets it; registrations go with the last that uses them.
  // Waits for at most one call of the device that registers a part of it. Throws for 0, which is
  // no region's id.
  void remove(uint64_t region);
  // Null: it is not registered, or not yet.
  RegionMemoryPtr find(uint64_t region) const noexcept;
  void clear() noexcept;  // and nothing comes any more

 private:
  class Adding;
  std::shared_ptr<WordMemory> words_of(const Region& region);
  void show(uint64_t region, std::shared_ptr<RegionMemory> memory);

  Devices devices_;
  uint64_t background_ = 0, max_part_ = 0;
  RangeCache cache_;
  bool windows_ = false;
  mutable std::mutex mutex_;  // not held while memory is registered, which may take seconds
  std::unordered_map<uint64_t, std::shared_ptr<RegionMemory>> regions_;
  std::mutex words_mutex_;
  std::weak_ptr<WordMemory> words_;
  Registrar registrar_;  // last: its jobs use what is above
};

}  // namespace kvxfer::verbs
