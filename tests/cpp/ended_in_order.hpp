// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs go to ERR, are drained, and are destroyed then: whatever a test did to its engines.
#pragma once

#include <dlfcn.h>
#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

namespace kvxfer {

// Since the process began (dirty_destroys of fake_verbs.h); 0 where the NICs are not made of
// software. Asked of the library that the engines have opened, which not every program links.
inline int64_t num_dirty_destroys() {
  const char* const path = std::getenv("KVXFER_LIBIBVERBS");
  void* const library = path != nullptr ? ::dlopen(path, RTLD_NOW | RTLD_NOLOAD) : nullptr;
  if (library == nullptr) return 0;
  using Count = int64_t (*)(const char*);
  const auto count = reinterpret_cast<Count>(::dlsym(library, "fake_verbs_count"));
  const int64_t out = count != nullptr ? count("dirty_destroys") : 0;
  ::dlclose(library);
  return out;
}

// When both engines of a test are closed; each is told of once.
inline void check_ended_in_order() {
  static int64_t known = 0;
  const int64_t now = num_dirty_destroys();
  CHECK_MESSAGE(std::exchange(known, now) == now,
                "queue pairs were destroyed before what was posted there had come back");
}

}  // namespace kvxfer
