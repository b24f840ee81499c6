// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What fork() must not do: a child that holds our sockets open hides our death
// from every peer, and one that runs our destructors joins threads that it does
// not have. So a handler in the child closes all descriptors that an Fd owns,
// and everything made before the fork is dead there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kvxfer {

// How many forks lie between the process that loaded this library and this one.
// Written by the handler in the child, when it has one thread; relaxed: there
// is nobody to race.
extern std::atomic<uint32_t> fork_generation;

// A member of whatever is bound to the process that made it.
class Birth {
 public:
  bool here() const noexcept {
    return generation_ == fork_generation.load(std::memory_order_relaxed);
  }

 private:
  uint32_t generation_ = fork_generation.load(std::memory_order_relaxed);
};

// Installs the handler; once, however often it is called.
void watch_forks();

// Descriptors of Fd objects, kept in a plain array of bits so that the handler
// may walk it.
void own_descriptor(int fd) noexcept;
void disown_descriptor(int fd) noexcept;

}  // namespace kvxfer
