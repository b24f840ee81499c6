// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's writes that are pushed: its NIC stores, through a window; here is counted what has
// landed. Bytes, then the immediates of all chains, then accepted, counted and shown.
#include "transport/verbs/incoming.hpp"

namespace kvxfer::verbs {

void Arrived::begin(uint32_t of_generation) noexcept {
  generation = of_generation;
  chains.clear();
  num = total = 0;
}

void Arrived::add(const Immediate& immediate) {
  if (immediate.chain / 64 >= chains.size()) chains.resize(immediate.chain / 64 + 1);
  uint64_t& word = chains[immediate.chain / 64];
  const uint64_t bit = uint64_t{1} << (immediate.chain % 64);
  if ((word & bit) == 0) ++num;
  word |= bit;
  if (immediate.last) total = immediate.chain + 1;
}

void Incoming::on_arrival(const Immediate& immediate) {
  Arrived& arrived = arrived_[immediate.slot];
  // Of the request that the slot has now, of its next one, whose head is still to come, or of one
  // that is over.
  const uint32_t ahead = (immediate.generation - arrived.generation) % Immediate::kGenerations;
  if (ahead >= Immediate::kGenerations / 2) return;
  if (ahead > 0) arrived.begin(immediate.generation);
  arrived.add(immediate);
  const JobPtr job = jobs_[immediate.slot];
  if (job && job->pushed && !job->stopping &&
      job->ticket.generation % Immediate::kGenerations == immediate.generation)
    settle(job);
}

std::vector<uint32_t> Incoming::held(const std::vector<uint32_t>& immediates) const {
  std::vector<uint32_t> out;
  for (const uint32_t bits : immediates) {
    const Immediate immediate = Immediate::unpack(bits);
    const Arrived& arrived = arrived_[immediate.slot];
    if (arrived.generation == immediate.generation && arrived.has(immediate.chain))
      out.push_back(bits);
  }
  return out;
}

void Incoming::stop_pushes(const Lease& lease, const Failure& failure) {
  for (size_t slot = 0; slot < jobs_.size(); ++slot) {
    const JobPtr job = jobs_[slot];
    if (job && job->pushed && !job->stopping && job->landing.lease.get() == &lease)
      stop(job, failure);
  }
}

}  // namespace kvxfer::verbs
