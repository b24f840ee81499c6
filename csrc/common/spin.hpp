// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Spinning before sleeping: briefly, and by one thread of a process at most, or the spinners would
// take the CPUs from the threads that they wait for.
#pragma once

#include <sched.h>

#include <atomic>

namespace kvxfer {

class SpinToken {
 public:
  SpinToken() = default;
  SpinToken(const SpinToken&) = delete;
  SpinToken& operator=(const SpinToken&) = delete;
  ~SpinToken() { give(); }
  bool take() noexcept {
    if (!mine_) mine_ = !taken_.exchange(true, std::memory_order_relaxed);
    return mine_;
  }
  void give() noexcept {
    if (mine_) taken_.store(false, std::memory_order_relaxed);
    mine_ = false;
  }

 private:
  // Whichever thread spins writes it. Relaxed: it bounds a cost and publishes nothing.
  inline static std::atomic<bool> taken_{false};
  bool mine_ = false;
};

inline void cpu_pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// This thread has woken another one since it last stepped aside.
inline thread_local bool woke_somebody = false;

// Before spinning. With few CPUs the scheduler likes to put a woken thread on its waker's CPU, and
// it would wait there for the end of our spin.
inline void step_aside(int num_cpus) noexcept {
  if (!woke_somebody) return;
  woke_somebody = false;
  if (num_cpus <= 2) ::sched_yield();
}

}  // namespace kvxfer
