// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What a completion belongs to: the kind in the upper byte of wr_id.
#pragma once

#include <cstdint>

namespace kvxfer::verbs {

enum class Work : uint8_t {
  kSend = 1,
  kReceive = 2,
  kRead = 3,
  kSendMarker = 4,
  kReadMarker = 5,
  kWrite = 6,  // a chain of WRITEs
  kWriteMarker = 7,
  kWindow = 8,   // a bind, or an invalidation
  kArrival = 9,  // the receive of a chain's immediate
  kSinkMarker = 10,
};
constexpr uint64_t work_id(Work work, uint64_t number) {
  return uint64_t{static_cast<uint8_t>(work)} << 56 | (number & ((uint64_t{1} << 56) - 1));
}
constexpr Work work_of(uint64_t id) { return static_cast<Work>(id >> 56); }
constexpr uint64_t number_of(uint64_t id) { return id & ((uint64_t{1} << 56) - 1); }

}  // namespace kvxfer::verbs
