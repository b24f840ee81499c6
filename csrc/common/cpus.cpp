// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "common/cpus.hpp"

#include <sched.h>

#include <thread>

namespace kvxfer {

int num_usable_cpus() noexcept {
  cpu_set_t set;
  // Fails on machines with more CPUs than the set has bits; then the mask hardly matters.
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace kvxfer
