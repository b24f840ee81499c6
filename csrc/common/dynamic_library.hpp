// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A library that is opened at run time: where it is missing there is a reason, not an error.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "common/error.hpp"

namespace kvxfer {

// Never closed, also not when this goes.
class DynamicLibrary {
 public:
  // The one that the environment's `variable` names, else `usual`, which `comes_with` something.
  DynamicLibrary(const char* variable, const char* usual, const char* comes_with) {
    const char* name = std::getenv(variable);
    name_ = name == nullptr || *name == '\0' ? usual : name;
    library_ = ::dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ != nullptr) return;
    const char* why = ::dlerror();
    reason_ = cat(name_, " cannot be opened: ", why != nullptr ? why : "no reason given",
                  "; it comes with ", comes_with);
  }

  // Null where the library has none, or is not there.
  template <class Function>
  void find(Function& function, const char* symbol, bool needed = true) {
    if (library_ == nullptr) return;
    function = reinterpret_cast<Function>(::dlsym(library_, symbol));
    if (function == nullptr && needed && reason_.empty())
      reason_ = cat(name_, " has no ", symbol, ": it is too old, or another library");
  }

  // Why it cannot be used; empty: it can.
  const std::string& reason() const noexcept { return reason_; }

 private:
  std::string name_, reason_;
  void* library_;
};

}  // namespace kvxfer
