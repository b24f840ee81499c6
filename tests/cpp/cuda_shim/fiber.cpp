// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer, loads the other stack's, returns there.
extern "C" void kvxfer_shim_switch(void** save, void* load);
asm(R"(
.text
.globl kvxfer_shim_switch
.type kvxfer_shim_switch, @function
kvxfer_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvxfer_shim_switch, .-kvxfer_shim_switch
.section .note.GNU-stack, "", @progbits
.text
)");

namespace shim {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;  // sanitised frames are large
Fiber* left = nullptr;                             // the fiber of the latest switch, and its goal
Fiber* entered = nullptr;

}  // namespace

Fiber::Fiber(void (*entry)()) : entry_(entry), size_(kStackBytes) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) abort();
  bottom_ = stack;
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
  stack_pointer_ = top;
}

Fiber::~Fiber() {
  if (entry_) munmap(const_cast<void*>(bottom_), size_);
}

void Fiber::switch_stacks(Fiber& from, Fiber& to) {
  left = &from;
  entered = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
  kvxfer_shim_switch(&from.stack_pointer_, to.stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
  // Who was left tells where its stack lies: the thread's own is known in no other way.
  __sanitizer_finish_switch_fiber(from.fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::begin() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
  entered->entry_();
  abort();  // an entry never returns
}

}  // namespace shim
