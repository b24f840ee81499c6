// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Numbers of a script that a peer follows: few that hit often, or any.
#pragma once

#include "fuzz.hpp"
#include "transport/records.hpp"

namespace kvxfer::fuzz {

inline uint64_t number(Input& input) {
  const uint8_t how = input.u8();
  switch (how >> 6) {
    case 0:
      return how & 63;
    case 1:
      return uint64_t{input.u16()} << (how & 7);
    case 2:
      return uint64_t{1} << (how & 63);
    default:
      return input.u64();
  }
}

inline Ticket ticket(Input& input) {
  const uint8_t how = input.u8();
  return how < 0xf0 ? Ticket{how & 7u, (how >> 3) & 3u} : Ticket{input.u32(), input.u32()};
}

}  // namespace kvxfer::fuzz
