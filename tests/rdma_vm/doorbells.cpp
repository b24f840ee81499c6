// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// 1024 writes of one size between two queue pairs, by how often the doorbell rings: doorbells
// DEVICE NBYTES ROUNDS. One JSON line a round: seconds by way of posting, the ways interleaved.
#include <cstdio>
#include <cstdlib>

#include "facts/pair.hpp"

namespace facts {
namespace {

constexpr size_t kWrites = 1024, kChain = 64;

struct Way {
  const char* name;
  size_t chain;      // work requests per post
  size_t in_flight;  // posts that may be outstanding
};
constexpr std::array kWays{Way{"chains of 64", kChain, 2}, Way{"one doorbell each", 1, 128},
                           Way{"one doorbell each, awaited", 1, 1}};

double seconds(Pair& pair, const Memory& from, const Memory& to, uint32_t nbytes, const Way& way) {
  std::array<ibv_sge, kChain> sges;
  std::array<ibv_send_wr, kChain> chain;
  const size_t places = kBytes / nbytes;
  const auto began = std::chrono::steady_clock::now();
  size_t outstanding = 0;
  const auto take = [&] {
    if (const auto done = pair.initiator.next(); !done || done->status != IBV_WC_SUCCESS) {
      fail("a write did not succeed", EIO);
    }
    --outstanding;
  };
  for (size_t posted = 0; posted < kWrites; posted += way.chain) {
    for (size_t i = 0; i < way.chain; ++i) {
      const size_t place = (posted + i) % places * nbytes;
      sges[i] = from.sge(place, nbytes);
      chain[i] = write_of(&sges[i], 1, to.address(place), to.mr->rkey);
      chain[i].send_flags = i + 1 == way.chain ? IBV_SEND_SIGNALED : 0;
      chain[i].next = i + 1 == way.chain ? nullptr : &chain[i + 1];
    }
    if (const int error = pair.initiator.post(chain[0]); error != 0) fail("ibv_post_send", error);
    if (++outstanding == way.in_flight) take();
  }
  while (outstanding > 0) take();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

void run(const char* name, uint32_t nbytes, int rounds) {
  Device device(name);
  World world{device, device};
  Limits limits;
  limits.send = 2 * kChain;
  limits.cqe = 256;
  Pair pair(world, limits);
  Memory from(device, 1), to(device);
  for (int round = -1; round < rounds; ++round) {  // the first warms up
    std::string line;
    for (size_t i = 0; i < kWays.size(); ++i) {
      const Way& way = kWays[(i + static_cast<size_t>(round + 1)) % kWays.size()];
      line += std::string(line.empty() ? "{" : ", ") + "\"" + way.name +
              "\": " + std::to_string(seconds(pair, from, to, nbytes, way));
    }
    if (round >= 0) std::printf("%s}\n", line.c_str());
  }
}

}  // namespace
}  // namespace facts

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: doorbells DEVICE NBYTES ROUNDS\n");
    return 2;
  }
  try {
    facts::run(argv[1], static_cast<uint32_t>(std::atoi(argv[2])), std::atoi(argv[3]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "doorbells: %s\n", error.what());
    return 1;
  }
  return 0;
}
