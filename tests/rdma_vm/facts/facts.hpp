// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How facts are said, and what several groups of them ask.
#pragma once

#include <cstdio>

#include "pair.hpp"

namespace facts {

using std::chrono_literals::operator""ms;

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

inline void say(const std::string& fact, const std::string& what) {
  std::printf("{\"fact\": %s, \"seen\": %s}\n", quoted(fact).c_str(), quoted(what).c_str());
  std::fflush(stdout);
}

inline std::string written(Pair& pair, Memory& from, uint64_t address, uint32_t rkey,
                           size_t nbytes = 4096) {
  ibv_sge sge = from.sge(0, nbytes);
  ibv_send_wr request = write_of(&sge, 1, address, rkey);
  if (const int error = pair.initiator.post(request); error != 0) return std::strerror(error);
  return pair.initiator.status();
}

inline std::string states(Pair& pair) {
  return std::string(", then initiator ") + name_of(pair.initiator.settled()) + ", target " +
         name_of(pair.target.settled());
}

inline std::string written_then_states(Pair& pair, Memory& from, uint64_t address, uint32_t rkey) {
  const std::string status = written(pair, from, address, rkey);
  return status + states(pair);
}

void posting_facts(World& world);
void window_facts(World& world);
void fence_facts(World& world);
void order_facts(World& world);
void end_facts(World& world);
void event_facts(World& world, const std::string& interface, const std::string& device);

}  // namespace facts
