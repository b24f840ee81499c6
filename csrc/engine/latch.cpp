// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/latch.hpp"

#include <utility>

#include "engine/engine.hpp"

namespace kvxfer {

bool Latch::hold(const TransferPtr& transfer) {
  std::lock_guard lock(mutex_);
  if (!settled_) held_.push_back(transfer);
  return !settled_;
}

void Latch::settle(std::optional<std::string> why) {
  std::vector<std::weak_ptr<Transfer>> held;
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(settled_, true)) return;
    failed_ = std::move(why);
    held.swap(held_);
  }
  for (auto& weak : held) {
    auto transfer = weak.lock();
    if (!transfer) continue;
    if (auto engine = transfer->engine.lock()) engine->let_go(transfer);
  }
}

bool Latch::settled() const {
  std::lock_guard lock(mutex_);
  return settled_;
}

std::optional<std::string> Latch::failed() const {
  std::lock_guard lock(mutex_);
  return failed_;
}

}  // namespace kvxfer
