// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/memory.hpp"

#include <algorithm>
#include <utility>

#include "common/error.hpp"
#include "cuda_driver/memory.hpp"
#include "transport/verbs/gpu_memory.hpp"

namespace kvxfer::verbs {
namespace {

// Thrown between two calls of the device: nobody wants the region any more.
struct Stopped {};

// No right to write for anybody but this process's own NICs; a peer's writes need a window.
int access_to(const Region& region, bool windows) {
  return (region.writable ? IBV_ACCESS_LOCAL_WRITE : 0) |
         (region.shareable ? IBV_ACCESS_REMOTE_READ : 0) |
         (windows && region.writable && region.shareable ? IBV_ACCESS_MW_BIND : 0);
}

}  // namespace

WordMemory::WordMemory(const Devices& devices, std::shared_ptr<ExportedWords> words)
    : words_(std::move(words)),
      registration_(devices, const_cast<std::byte*>(words_->base()), ExportedWords::kBytes,
                    IBV_ACCESS_REMOTE_READ, "the words of leases and regions") {}

RegionMemory::RegionMemory(std::shared_ptr<WordMemory> words, const Region& region,
                           uint64_t max_part, bool windows)
    : words_(std::move(words)),
      name_(region.name),
      readable_(region.shareable),
      shares_(!region.shareable || !region.require_lease),
      access_(access_to(region, windows)),
      device_(region.device),
      keep_(region.keep) {
  for (const Piece& piece : region.pieces)
    for (uint64_t skip = 0; skip < piece.nbytes; skip += max_part)
      parts_.push_back(
          {piece.base + skip, piece.offset + skip, std::min(max_part, piece.nbytes - skip)});
}

RegionMemory::~RegionMemory() = default;

Range RegionMemory::range_of(size_t part) const noexcept {
  return {parts_[part].base, parts_[part].nbytes, access_};
}

RegistrationPtr RegionMemory::register_part(size_t part, const Devices& devices,
                                            const Registration::Step& step) const {
  const auto& [base, offset, nbytes] = parts_[part];
  const std::string what = parts_.size() == 1 ? cat("region '", name_, "'")
                                              : cat("part ", part, " of region '", name_, "'");
  if (!is_on_gpu())
    return std::make_shared<const Registration>(devices, base, nbytes, access_, what, step);
  const GpuRange range(base, nbytes, what);
  return std::make_shared<const Registration>(
      devices, nbytes, access_,
      [&](const Device& device, int access) { return range.register_with(device, access); }, step);
}

std::string RegionMemory::how() const {
  std::string out;
  for (size_t i = 0; i < registrations_.size(); ++i) {
    const bool seen = std::ranges::any_of(
        registrations_.begin(), registrations_.begin() + i,
        [&](const RegistrationPtr& each) { return each->how() == registrations_[i]->how(); });
    if (!seen) out += cat(out.empty() ? "" : "; ", registrations_[i]->how());
  }
  return out;
}

void RegionMemory::complete(const Devices& devices, RangeCache& cache,
                            const Registration::Step& step) {
  NodeOfMemory nodes;
  registrations_.reserve(parts_.size());  // so that what was taken is always known to leave()
  try {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Piece& part = parts_[i];
      RegistrationPtr registration = shares_ ? cache.take(range_of(i)) : nullptr;
      if (registration) {
        registrations_.push_back(std::move(registration));
        step(part.nbytes * devices.size());
      } else {
        registrations_.push_back(register_part(i, devices, step));
        if (shares_) cache.put(range_of(i), registrations_.back());
      }
      if (!is_on_gpu())
        nodes.look_at(part.base, part.nbytes);  // pinned by now, so its pages are there
    }
  } catch (...) {
    leave(cache);
    registrations_.clear();
    throw;
  }
  preference_ = is_on_gpu() ? Preference(devices, cuda_driver::bus_id(device_))
                            : Preference(devices, nodes.node());
}

void RegionMemory::leave(RangeCache& cache) noexcept {
  if (!shares_) return;
  for (size_t i = 0; i < registrations_.size(); ++i) cache.leave(range_of(i), registrations_[i]);
}

size_t RegionMemory::part_at(uint64_t offset) const noexcept {
  if (parts_.size() == 1) return 0;
  const auto after =
      std::upper_bound(parts_.begin(), parts_.end(), offset,
                       [](uint64_t value, const Piece& part) { return value < part.offset; });
  return static_cast<size_t>(after - parts_.begin()) - 1;
}

RegionMemory::Hull RegionMemory::hull(uint64_t offset, uint64_t nbytes) const noexcept {
  const size_t i = part_at(offset);
  const Piece& part = parts_[i];
  const uint64_t skip = offset - part.offset;
  if (nbytes > part.nbytes - skip) return {};
  return {part.base + skip, registrations_[i].get()};
}

RegionMemory::Run RegionMemory::at(uint64_t offset, uint64_t nbytes) const noexcept {
  const size_t i = part_at(offset);
  const Piece& part = parts_[i];
  const uint64_t skip = offset - part.offset;
  return {part.base + skip,
          static_cast<uint32_t>(std::min({nbytes, part.nbytes - skip, uint64_t{kMaxRunBytes}})),
          registrations_[i].get()};
}

// Registers one region, here and now or on the registrar's thread.
class MemoryTable::Adding final : public Registrar::Job {
 public:
  Adding(MemoryTable& table, uint64_t region, std::shared_ptr<RegionMemory> memory,
         ExposurePtr exposure, Describe describe)
      : table_(table),
        region_(region),
        memory_(std::move(memory)),
        exposure_(std::move(exposure)),
        describe_(std::move(describe)) {}

  void run(const std::atomic<bool>& stop) noexcept override {
    try {
      memory_->complete(table_.devices_, table_.cache_, [&](uint64_t nbytes) {
        exposure_->nbytes_done.fetch_add(nbytes, std::memory_order_relaxed);
        if (stop.load(std::memory_order_relaxed)) throw Stopped{};
      });
      std::string text = describe_(*memory_);
      table_.show(region_, std::move(memory_));
      exposure_->end(Exposure::State::kDone, std::move(text));
    } catch (const Stopped&) {
      drop();
    } catch (const Error& error) {
      const uint64_t done = exposure_->nbytes_done.exchange(0, std::memory_order_relaxed);
      exposure_->end(Exposure::State::kFailed,
                     done == 0 ? std::string(error.what())
                               : cat(error.what(), "; it came after ", done, " of ",
                                     exposure_->nbytes, " bytes, which were given back"),
                     error.err);
    } catch (const std::exception& error) {  // no memory for a list
      exposure_->end(Exposure::State::kFailed, error.what());
    }
  }
  void drop() noexcept override {
    exposure_->nbytes_done.store(0, std::memory_order_relaxed);
    exposure_->end(Exposure::State::kDropped);
  }

 private:
  MemoryTable& table_;
  const uint64_t region_;
  std::shared_ptr<RegionMemory> memory_;
  const ExposurePtr exposure_;
  const Describe describe_;
};

void MemoryTable::open(Devices devices, uint64_t background, uint64_t max_part, bool windows) {
  windows_ = windows;
  devices_ = std::move(devices);
  background_ = background;
  max_part_ = max_part;
  for (const auto& device : devices_)
    if (const uint64_t limit = device->limits().max_mr_size; limit > 0)
      max_part_ = std::min(max_part_, limit);
}

std::shared_ptr<WordMemory> MemoryTable::words_of(const Region& region) {
  const auto& exported = region.gate.word().words();
  if (!exported) return nullptr;
  std::lock_guard lock(words_mutex_);
  auto words = words_.lock();
  if (!words) words_ = words = std::make_shared<WordMemory>(devices_, exported);
  return words;
}

void MemoryTable::add(Region& region, Describe describe) {
  const auto exposure =
      std::make_shared<Exposure>("verbs", region.nbytes * uint64_t{devices_.size()});
  region.exposures.push_back(exposure);
  std::shared_ptr<RegionMemory> memory;
  try {
    memory = std::make_shared<RegionMemory>(words_of(region), region, max_part_, windows_);
  } catch (const Error& error) {
    return exposure->end(Exposure::State::kFailed, error.what(), error.err);
  }
  auto job =
      std::make_unique<Adding>(*this, region.id, std::move(memory), exposure, std::move(describe));
  // A GPU's pages are there and stay where they are, so registering them is short; and without it
  // nothing can be done with them meanwhile.
  if (exposure->nbytes > background_ && !region.is_on_gpu())
    return registrar_.submit(region.id, std::move(job));
  const std::atomic<bool> never{false};
  job->run(never);
}

void MemoryTable::show(uint64_t region, std::shared_ptr<RegionMemory> memory) {
  std::lock_guard lock(mutex_);
  regions_[region] = std::move(memory);
}

void MemoryTable::remove(uint64_t region) {
  if (region == 0)
    fail(Code::kInternal, "memory of region 0 is to be removed, which was never given as an id");
  registrar_.drop(region);             // from here on nobody shows it
  std::shared_ptr<RegionMemory> last;  // deregistered after the lock
  {
    std::lock_guard lock(mutex_);
    const auto it = regions_.find(region);
    if (it == regions_.end()) return;
    last = std::move(it->second);
    regions_.erase(it);
  }
  last->leave(cache_);
}

RegionMemoryPtr MemoryTable::find(uint64_t region) const noexcept {
  std::lock_guard lock(mutex_);
  auto it = regions_.find(region);
  return it == regions_.end() ? nullptr : it->second;
}

void MemoryTable::clear() noexcept {
  registrar_.stop();
  std::unordered_map<uint64_t, std::shared_ptr<RegionMemory>> last;
  {
    std::lock_guard lock(mutex_);
    last.swap(regions_);
  }
  for (const auto& [region, memory] : last) memory->leave(cache_);
}

}  // namespace kvxfer::verbs
