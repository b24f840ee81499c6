// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A fiber: a stack of its own, switched by hand, since swapcontext costs a system call each way.
// x86-64 alone; AddressSanitizer is told of every switch, or it would take one stack for another.
#pragma once

#include <cstddef>

namespace shim {

class Fiber {
 public:
  Fiber() = default;                // the thread's own stack; made by the first switch away from it
  explicit Fiber(void (*entry)());  // entry never returns
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which must be the running fiber, and goes on where `to` was left.
  static void switch_stacks(Fiber& from, Fiber& to);

 private:
  static void begin();  // what a new stack returns into

  void* stack_pointer_ = nullptr;
  void (*entry_)() = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;  // ASan's, while the fiber is not running
};

}  // namespace shim
