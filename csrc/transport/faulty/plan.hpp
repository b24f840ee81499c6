// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What goes wrong, how often, and from which seed: "wrap=shm seed=7 delay=0.2:5ms drop=0.01".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/status.hpp"

namespace kvxfer::faulty {

// Probabilities are per request; 0: never. The harmless ones, which no user may notice but by time:
// delay, delay_end, reorder, duplicate, again.
struct Plan {
  std::string text;  // as given, for explain()
  std::string wrap;  // the transport below
  uint64_t seed = 0;
  struct Delay {
    double probability = 0;
    int64_t up_to_ns = 0;
  };
  Delay delay;           // on its way to the transport below
  Delay delay_end;       // its end on the way back
  double reorder = 0;    // its end waits for the next one, 5 ms at most
  double duplicate = 0;  // its end is told twice
  double again = 0;      // back-pressure, 1 ms long
  double drop = 0;       // never reaches the transport below and never ends by itself
  double lose_ack = 0;   // lands, and its end is never told
  double truncate = 0;   // its first half lands, then the connection breaks
  struct {
    double probability = 0;
    Code code = Code::kOk;  // kOk: each in turn
  } error;                  // ends with this code, nothing is sent
  uint64_t die = 0;         // the connection breaks right after this post, counted from 1; 0: never
};

// Throws kInvalidArgument naming the word that is wrong.
Plan parse_plan(std::string_view text);

}  // namespace kvxfer::faulty
