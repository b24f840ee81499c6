// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory comes and goes: allocate, register, deregister.
#include <algorithm>
#include <numeric>

#include "common/random.hpp"
#include "cuda_driver/memory.hpp"
#include "engine/engine.hpp"
#include "engine/memory.hpp"

namespace kvxfer {

void check_name(const char* what, const std::string& name) {
  if (name.empty() || name.size() > kMaxNameBytes)
    fail(Code::kInvalidArgument, what, " name must have 1 to ", kMaxNameBytes, " bytes, not ",
         name.size());
  if (!is_printable(name))
    fail(Code::kInvalidArgument, what, " name has a control character at byte ",
         std::ranges::find_if(name, [](char c) { return !is_printable({&c, 1}); }) - name.begin(),
         "; peers show it in messages and logs");
}

// One byte under two offsets: what an overlap of destinations is refused for could not be seen.
static void check_apart(const std::vector<Piece>& pieces) {
  std::vector<size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::sort(order, {}, [&](size_t i) { return pieces[i].base; });
  for (size_t i = 1; i < order.size(); ++i) {
    const Piece &low = pieces[order[i - 1]], &high = pieces[order[i]];
    if (low.base + low.nbytes > high.base)
      fail(Code::kInvalidArgument, "buffers ", std::min(order[i - 1], order[i]), " and ",
           std::max(order[i - 1], order[i]), " share memory; a region has each byte once");
  }
}

// The GPU that all of it lies in.
static int device_of(const std::vector<Piece>& pieces) {
  int out = kHostMemory;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::string what = pieces.size() == 1 ? "the buffer" : cat("buffer ", i);
    const int device = cuda_driver::look_at(pieces[i].base, pieces[i].nbytes, what).device;
    if (i > 0 && device != out)
      fail(Code::kInvalidArgument, "buffer 0 is memory of ", device_text(out), ", and buffer ", i,
           " of ", device_text(device), "; a region lies in one GPU: register one for each");
    out = device;
  }
  return out;
}

void check_reached(const Region& region) {
  for (const ExposurePtr& exposure : region.exposures)
    if (exposure->required && exposure->state() == Exposure::State::kFailed)
      throw Error(Code::kRegistration, exposure->text(), exposure->err(), exposure->transport);
}

RegionPtr Engine::allocate(uint64_t nbytes, RegionOptions options) {
  check_open();
  check_name("region", options.name);
  if (nbytes == 0) fail(Code::kInvalidArgument, "a region needs at least one byte");
  Segment segment = allocate_segment(nbytes, options.name);
  auto region = std::make_shared<Region>();
  region->name = options.name;
  region->nbytes = nbytes;
  region->require_lease = options.require_lease;
  region->shareable = options.shareable;
  region->pieces = {{segment.base, 0, nbytes}};
  region->backing = std::move(segment.backing);
  region->memfd = std::move(segment.memfd);
  region->keep = std::move(segment.mapping);
  return add_region(std::move(region));
}

RegionPtr Engine::register_pieces(std::vector<Piece> pieces, bool writable,
                                  std::shared_ptr<void> keep, RegionOptions options) {
  check_open();
  check_name("region", options.name);
  auto region = std::make_shared<Region>();
  region->name = options.name;
  region->writable = writable;
  region->require_lease = options.require_lease;
  region->shareable = options.shareable;
  region->keep = std::move(keep);
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].nbytes == 0) fail(Code::kInvalidArgument, "buffer ", i, " is empty");
    pieces[i].offset = region->nbytes;
    region->nbytes += pieces[i].nbytes;
  }
  if (pieces.empty()) fail(Code::kInvalidArgument, "a region needs at least one buffer");
  check_apart(pieces);
  if (options.is_on_gpu) {
    if (!options.shareable)
      fail(Code::kInvalidArgument, "region '", options.name,
           "' is a GPU's memory and has share=\"never\": its bytes would go in messages, which the "
           "CPU copies and cannot reach them");
    region->device = device_of(pieces);
  }
  region->pieces = std::move(pieces);
  return add_region(std::move(region));
}

std::string Engine::unused_region_name() {
  std::lock_guard lock(mutex_);
  check_open();
  for (;;) {
    std::string name = cat("region-", ++num_unnamed_);
    if (std::ranges::none_of(regions_, [&](auto& each) { return each.second->name == name; }))
      return name;
  }
}

void Engine::check_new_region(const Region& region) const {
  check_open();
  if (regions_.size() >= kMaxRegions)
    fail(Code::kRegistration, "an engine has at most ", kMaxRegions,
         " regions; deregister some, or register several buffers as one region");
  for (auto& [id, other] : regions_)
    if (other->name == region.name)
      fail(Code::kInvalidArgument, "a region named '", region.name, "' exists; pass another name=");
}

// To every transport. One that was asked for by name must reach it, which for a large region is
// known later (check_reached); others go without it, and explain() has the reason.
void Engine::expose(const RegionPtr& region) {
  try {
    for (auto& [name, transport] : transports_) transport->expose(region);
    for (const ExposurePtr& exposure : region->exposures)
      exposure->required = !options_.transports.empty();
    if (region->is_on_gpu()) check_gpu_reached(*region);
    check_reached(*region);
  } catch (...) {
    withdraw(*region);
    throw;
  }
}

// Where no transport takes it, nothing could ever be done with it: that is an error now, not at
// the first transfer.
void Engine::check_gpu_reached(const Region& region) const {
  std::string reasons;
  int err = 0;
  for (const ExposurePtr& exposure : region.exposures) {
    if (exposure->state() == Exposure::State::kDone) return;
    reasons += cat("; ", exposure->transport, ": ", exposure->text());
    err = exposure->err();
  }
  if (region.exposures.empty() && !allows("verbs"))
    reasons = "; verbs, which could, is left out by transports=";
  for (const std::string& reason : not_here_)
    if (reason.starts_with("verbs:")) reasons += cat("; ", reason);
  throw Error(Code::kRegistration,
              cat("region '", region.name, "' is memory of ", device_text(region.device),
                  ", which no transport of this engine reaches: the others copy by the CPU",
                  reasons, ". Or copy it to host memory, and register that"),
              err, region.exposures.empty() ? "" : region.exposures.front()->transport);
}

void Engine::withdraw(Region& region) noexcept {
  for (auto& [name, transport] : transports_) transport->withdraw(region);
}

RegionPtr Engine::add_region(RegionPtr region) {
  region->key = random_bytes<16>();
  region->owner = this;
  if (words_) region->gate.export_word(words_->take());
  {
    std::lock_guard lock(mutex_);
    check_new_region(*region);
    region->id = next_id_++;
  }
  expose(region);  // without the lock: it may pin gigabytes
  try {
    std::lock_guard lock(mutex_);
    check_new_region(*region);  // two of one name at once: the second is turned away
    regions_.emplace(region->id, region);
    broadcast(RegionAdded{
        {region->id, region->key}, region->nbytes, region->writable, region->name, region->device});
  } catch (...) {
    withdraw(*region);
    throw;
  }
  return region;
}

void Engine::deregister(const RegionPtr& region) {
  std::vector<LeasePtr> leases;
  {
    std::lock_guard lock(mutex_);
    auto it = regions_.find(region->id);
    if (it == regions_.end() || it->second != region) {
      if (region->gate.closed()) return;  // again: harmless
      fail(Code::kInvalidArgument, "region '", region->name, "' belongs to another engine");
    }
    region->leaving.store(true, std::memory_order_seq_cst);
    if (const uint64_t uses = region->uses.load(std::memory_order_seq_cst); uses != 0) {
      region->leaving.store(false, std::memory_order_seq_cst);
      fail(Code::kInvalidArgument, "region '", region->name, "' is in use by ", uses,
           " transfer(s) that have not quiesced; wait for them or cancel them "
           "first");
    }
    regions_.erase(it);
    for (auto& [id, lease] : leases_)
      if (lease->region == region) leases.push_back(lease);
    broadcast(RegionRemoved{region->id});
  }
  region->gate.close();
  for (auto& lease : leases) begin_revoke(lease);
  withdraw(*region);
}

}  // namespace kvxfer
