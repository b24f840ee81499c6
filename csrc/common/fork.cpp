// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "common/fork.hpp"

#include <pthread.h>
#include <unistd.h>

#include <mutex>

namespace kvxfer {

std::atomic<uint32_t> fork_generation{0};

namespace {

// Linux's default limit of descriptors per process (fs.nr_open); what lies
// beyond is not closed in a child, which is what happened to all of them
// before.
constexpr size_t kMaxDescriptors = size_t{1} << 20;
// Set and cleared by whoever makes and drops an Fd, read by the handler in a
// child, which has one thread; relaxed suffices, since fork() itself orders.
std::atomic<uint64_t> owned[kMaxDescriptors / 64];

bool within(int fd) noexcept { return fd >= 0 && static_cast<size_t>(fd) < kMaxDescriptors; }

// Async-signal-safe: other threads may have held any lock at the moment of the
// fork.
void in_child() noexcept {
  fork_generation.fetch_add(1, std::memory_order_relaxed);
  for (size_t word = 0; word < kMaxDescriptors / 64; ++word) {
    uint64_t bits = owned[word].load(std::memory_order_relaxed);
    if (bits == 0) continue;  // not written: most of these pages were never touched
    owned[word].store(0, std::memory_order_relaxed);
    for (; bits != 0; bits &= bits - 1)
      ::close(static_cast<int>(word * 64 + static_cast<size_t>(__builtin_ctzll(bits))));
  }
}

}  // namespace

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { ::pthread_atfork(nullptr, nullptr, &in_child); });
}

void own_descriptor(int fd) noexcept {
  if (within(fd)) owned[fd / 64].fetch_or(uint64_t{1} << (fd % 64), std::memory_order_relaxed);
}

void disown_descriptor(int fd) noexcept {
  if (within(fd)) owned[fd / 64].fetch_and(~(uint64_t{1} << (fd % 64)), std::memory_order_relaxed);
}

}  // namespace kvxfer
