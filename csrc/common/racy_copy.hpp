// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Copies memory that its owner may be writing, on purpose: what came is judged afterwards, by a
// word that says whether it may be used. TSan is right that this is a race, so in its build it does
// not see the copy.
#pragma once

#include <cstddef>
#include <cstring>

namespace kvxfer {

#ifdef __SANITIZE_THREAD__
__attribute__((noinline, no_sanitize("thread"))) inline void racy_copy(std::byte* to,
                                                                       const std::byte* from,
                                                                       size_t nbytes) noexcept {
  // volatile, or the compiler would make it a call of the memcpy that TSan intercepts.
  const volatile std::byte* source = from;
  for (size_t i = 0; i < nbytes; ++i) to[i] = source[i];
}
#else
inline void racy_copy(std::byte* to, const std::byte* from, size_t nbytes) noexcept {
  std::memcpy(to, from, nbytes);
}
#endif

}  // namespace kvxfer
