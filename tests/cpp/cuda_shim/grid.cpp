// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "grid.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.hpp"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {
namespace {

constexpr int kWarp = 32;

struct Warp {
  void* arguments[kWarp];
  int arrived = 0, kind = 0;
};

struct Grid {
  Fiber host;
  std::vector<std::unique_ptr<Fiber>> threads;  // kept from launch to launch
  std::vector<uint32_t> ready, late;  // late: of the slow warp, which runs when nobody else can
  uint32_t slow_warp = 0;
  std::vector<Warp> warps;
  std::vector<uint32_t> at_barrier;
  uint32_t num_threads = 0, done = 0, running = 0;
  const std::function<void()>* body = nullptr;
  std::unique_ptr<char[]> shared;
  size_t shared_bytes = 0;
  std::string error;
  uint64_t block_number = 0;
  std::mt19937_64 random{1};
};

Grid& grid() {
  static Grid instance;
  return instance;
}

void set_thread(uint32_t flat) {
  Grid& g = grid();
  g.running = flat;
  threadIdx = {flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / blockDim.x / blockDim.y};
}

void make_ready(uint32_t flat) {
  Grid& g = grid();
  (flat / kWarp == g.slow_warp ? g.late : g.ready).push_back(flat);
}

uint32_t take(std::vector<uint32_t>& from) {
  std::swap(from[grid().random() % from.size()], from.back());
  const uint32_t taken = from.back();
  from.pop_back();
  return taken;
}

// Hands over to a thread that can go on, else to the host.
void leave() {
  Grid& g = grid();
  const uint32_t self = g.running;
  if (g.ready.empty() && g.late.empty()) {
    if (g.done < g.num_threads && g.error.empty()) {
      g.error = "threads wait at different barriers, or one that others have passed or left";
    }
    Fiber::switch_stacks(*g.threads[self], g.host);
  } else {
    const uint32_t next = take(g.ready.empty() ? g.late : g.ready);
    set_thread(next);
    if (next != self) Fiber::switch_stacks(*g.threads[self], *g.threads[next]);
  }
}

// A fiber outlives its thread of one block, and is the same thread of the next block.
void thread_main() {
  for (;;) {
    (*grid().body)();
    ++grid().done;
    leave();
  }
}

void run_block(const std::function<void()>& body) {
  Grid& g = grid();
  g.body = &body;
  ++g.block_number;
  g.done = 0;
  g.at_barrier.clear();
  g.warps.assign((g.num_threads + kWarp - 1) / kWarp, {});
  while (g.threads.size() < g.num_threads) {
    g.threads.push_back(std::make_unique<Fiber>(&thread_main));
  }
  // Warps that all run alike seldom overtake one another by more than a step: each block has a
  // slow one, or none.
  g.slow_warp = static_cast<uint32_t>(g.random() % (g.warps.size() + 1));
  g.ready.clear();
  g.late.clear();
  for (uint32_t i = 0; i < g.num_threads; ++i) make_ready(i);
  std::memset(g.shared.get(), 0xff, g.shared_bytes);
  const uint32_t first = take(g.ready.empty() ? g.late : g.ready);
  set_thread(first);
  Fiber::switch_stacks(g.host, *g.threads[first]);
  if (!g.error.empty()) {
    g.threads.clear();  // they hang in the middle of a kernel
    throw std::runtime_error(std::exchange(g.error, {}));
  }
}

}  // namespace

uint64_t last_grid_size() { return uint64_t{gridDim.x} * gridDim.y * gridDim.z; }
void set_seed(uint64_t seed) { grid().random.seed(seed); }

void run(const Launch& launch, const std::function<void()>& body) {
  Grid& g = grid();
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  g.num_threads = blockDim.x * blockDim.y * blockDim.z;
  g.shared = std::make_unique<char[]>(launch.shared_bytes);
  g.shared_bytes = launch.shared_bytes;
  std::vector<uint64_t> order(size_t{gridDim.x} * gridDim.y * gridDim.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), g.random);
  for (const uint64_t flat : order) {
    blockIdx = {static_cast<uint32_t>(flat % gridDim.x),
                static_cast<uint32_t>(flat / gridDim.x % gridDim.y),
                static_cast<uint32_t>(flat / gridDim.x / gridDim.y)};
    run_block(body);
  }
}

void stop_launch(const char* reason) {
  Grid& g = grid();
  g.error = reason;
  Fiber::switch_stacks(*g.threads[g.running], g.host);
  std::abort();  // never resumed
}

char* shared_memory() { return grid().shared.get(); }
size_t shared_bytes() { return grid().shared_bytes; }
int thread() { return static_cast<int>(grid().running); }
uint64_t block_number() { return grid().block_number; }
int lane() { return thread() % kWarp; }

void wait_for_block() {
  Grid& g = grid();
  g.at_barrier.push_back(g.running);
  if (g.at_barrier.size() < g.num_threads) return leave();
  // The last one to come does not run on first: that would favour one order.
  for (const uint32_t thread : g.at_barrier) make_ready(thread);
  g.at_barrier.clear();
  leave();
}

void meet(int kind, void* argument, void (*operation)(void* const*)) {
  Grid& g = grid();
  const uint32_t first = g.running / kWarp * kWarp;
  Warp& warp = g.warps[g.running / kWarp];
  if (warp.arrived > 0 && warp.kind != kind)
    stop_launch("lanes of a warp meet in different operations");
  warp.kind = kind;
  warp.arguments[lane()] = argument;
  if (++warp.arrived == kWarp) {
    operation(warp.arguments);
    warp.arrived = 0;
    for (uint32_t i = 0; i < kWarp; ++i) make_ready(first + i);
  }
  leave();
}

}  // namespace shim
