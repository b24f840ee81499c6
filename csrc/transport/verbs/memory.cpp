// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/memory.hpp"

#include <algorithm>
#include <utility>

#include "common/error.hpp"
#include "transport/verbs/nearness.hpp"

namespace kvxfer::verbs {

WordMemory::WordMemory(const Devices& devices, std::shared_ptr<ExportedWords> words)
    : words_(std::move(words)),
      registration_(devices, const_cast<std::byte*>(words_->base()), ExportedWords::kBytes,
                    IBV_ACCESS_REMOTE_READ, "the words of leases and regions") {}

RegionMemory::RegionMemory(const Devices& devices, std::shared_ptr<WordMemory> words,
                           const Region& region, bool windows)
    : words_(std::move(words)),
      readable_(region.shareable),
      pieces_(region.pieces),
      keep_(region.keep) {
  // No right to write for anybody but this process's own NICs; a peer's writes need a window.
  const int access = (region.writable ? IBV_ACCESS_LOCAL_WRITE : 0) |
                     (region.shareable ? IBV_ACCESS_REMOTE_READ : 0) |
                     (windows && region.writable && region.shareable ? IBV_ACCESS_MW_BIND : 0);
  NodeOfMemory nodes;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const std::string what = pieces_.size() == 1
                                 ? cat("region '", region.name, "'")
                                 : cat("piece ", i, " of region '", region.name, "'");
    registrations_.push_back(
        std::make_unique<Registration>(devices, pieces_[i].base, pieces_[i].nbytes, access, what));
    nodes.look_at(pieces_[i].base, pieces_[i].nbytes);  // pinned by now, so its pages are there
  }
  node_ = nodes.node();
}

RegionMemory::~RegionMemory() = default;

size_t RegionMemory::piece_at(uint64_t offset) const noexcept {
  if (pieces_.size() == 1) return 0;
  const auto after =
      std::upper_bound(pieces_.begin(), pieces_.end(), offset,
                       [](uint64_t value, const Piece& piece) { return value < piece.offset; });
  return static_cast<size_t>(after - pieces_.begin()) - 1;
}

RegionMemory::Hull RegionMemory::hull(uint64_t offset, uint64_t nbytes) const noexcept {
  const size_t i = piece_at(offset);
  const Piece& piece = pieces_[i];
  const uint64_t skip = offset - piece.offset;
  if (nbytes > piece.nbytes - skip) return {};
  return {piece.base + skip, registrations_[i].get()};
}

RegionMemory::Run RegionMemory::at(uint64_t offset, uint64_t nbytes) const noexcept {
  const size_t i = piece_at(offset);
  const Piece& piece = pieces_[i];
  const uint64_t skip = offset - piece.offset;
  return {piece.base + skip,
          static_cast<uint32_t>(std::min({nbytes, piece.nbytes - skip, uint64_t{kMaxRunBytes}})),
          registrations_[i].get()};
}

void MemoryTable::add(const Region& region) {
  std::shared_ptr<WordMemory> words;
  if (const auto& exported = region.gate.word().words()) {
    std::lock_guard lock(words_mutex_);
    words = words_.lock();
    if (!words) words_ = words = std::make_shared<WordMemory>(devices_, exported);
  }
  auto memory = std::make_shared<const RegionMemory>(devices_, words, region, windows_);
  std::lock_guard lock(mutex_);
  regions_[region.id] = std::move(memory);
}

void MemoryTable::remove(uint64_t region) noexcept {
  RegionMemoryPtr last;  // deregistered after the lock
  std::lock_guard lock(mutex_);
  if (auto it = regions_.find(region); it != regions_.end()) {
    last = std::move(it->second);
    regions_.erase(it);
  }
}

RegionMemoryPtr MemoryTable::find(uint64_t region) const noexcept {
  std::lock_guard lock(mutex_);
  auto it = regions_.find(region);
  return it == regions_.end() ? nullptr : it->second;
}

void MemoryTable::clear() noexcept {
  std::unordered_map<uint64_t, RegionMemoryPtr> last;
  std::lock_guard lock(mutex_);
  last.swap(regions_);
}

}  // namespace kvxfer::verbs
