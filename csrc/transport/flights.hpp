// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A connection's own requests, by slot. A slot that is used again has another generation, so that a
// late answer to its predecessor finds nobody.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "transport/records.hpp"

namespace kvxfer {

// Flight: `RequestPtr request`, null where the slot is free, `uint32_t generation`, and what the
// transport needs. Not locked here: each transport says who may look at what.
template <typename Flight>
class Flights {
 public:
  explicit Flights(uint32_t num_slots) : flights_(num_slots) {
    free_.reserve(num_slots);
    for (uint32_t slot = num_slots; slot-- > 0;) free_.push_back(slot);
  }

  bool full() const noexcept { return free_.empty(); }
  uint32_t next() const noexcept { return free_.back(); }  // the slot of the next request
  void occupy(const RequestPtr& request) {
    const uint32_t slot = free_.back();
    free_.pop_back();
    flights_[slot].request = request;
    by_id_.emplace(request->id, slot);
  }
  // As new, but for its generation.
  void reset(uint32_t slot) noexcept {
    Flight& flight = flights_[slot];
    const uint32_t generation = flight.generation;
    flight = Flight{};
    flight.generation = generation;
  }
  void release(uint32_t slot) noexcept {
    by_id_.erase(flights_[slot].request->id);
    reset(slot);
    free_.push_back(slot);
  }

  // The flight of this ticket, if it is still the same one.
  Flight* find(Ticket ticket) noexcept {
    if (ticket.slot >= flights_.size()) return nullptr;
    Flight& flight = flights_[ticket.slot];
    return flight.request && flight.generation == ticket.generation ? &flight : nullptr;
  }
  std::optional<uint32_t> slot_of(const Request& request) const {
    const auto found = by_id_.find(request.id);
    if (found == by_id_.end()) return {};
    return found->second;
  }
  Flight& operator[](uint32_t slot) noexcept { return flights_[slot]; }
  auto begin() noexcept { return flights_.begin(); }
  auto end() noexcept { return flights_.end(); }

 private:
  std::vector<Flight> flights_;
  std::vector<uint32_t> free_;
  std::unordered_map<uint64_t, uint32_t> by_id_;
};

}  // namespace kvxfer
