// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A launch on the CPU: the threads of a block are fibers, blocks run one after the other, both in
// an order drawn from a seed. A thread runs until it waits for others, so a missing barrier shows
// as a stale value in some order. A barrier that not all reach ends the launch with an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace shim {

struct Launch {
  uint32_t grid[3], block[3];
  size_t shared_bytes;
};

// Runs body once per thread of the grid. Throws std::runtime_error where the kernel cannot go on.
void run(const Launch& launch, const std::function<void()>& body);

void set_seed(uint64_t seed);                       // orders of the launches from here on
uint64_t last_grid_size();                          // blocks of the latest launch
[[noreturn]] void stop_launch(const char* reason);  // called from within a kernel

// What a kernel asks for. `shared` is of exactly the launch's size and starts as NaN.
char* shared_memory();
size_t shared_bytes();
int lane();
uint64_t block_number();  // of all blocks ever run
int thread();             // flat index in the block
void wait_for_block();

// All 32 lanes of a warp meet with an argument each; the last one to come runs `operation` over
// the 32 arguments, then all go on. `kind` says which operation it is: lanes must agree.
void meet(int kind, void* argument, void (*operation)(void* const* arguments));

}  // namespace shim
