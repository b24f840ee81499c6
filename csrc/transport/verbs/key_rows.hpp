// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The key rows of a message that is being made.
#pragma once

#include <unordered_map>
#include <vector>

#include "transport/verbs/rail.hpp"
#include "transport/verbs/records.hpp"

namespace kvxfer::verbs {

class KeyRowsOut {
 public:
  explicit KeyRowsOut(const Rails& rails) : rails_(rails) {}
  void clear() noexcept {
    known_.clear();
    last_ = nullptr;
    num_ = 0;
    keys_.clear();
  }
  uint32_t num() const noexcept { return num_; }
  // No further registration has room; those that are known have.
  bool full() const noexcept { return num_ == kMaxKeyRows; }
  uint32_t row_of(const Registration& registration) {
    if (&registration == last_) return last_row_;
    const auto [it, is_new] = known_.try_emplace(&registration, num_);
    if (is_new) {
      const Keys row = rails_.row_of(registration);
      keys_.insert(keys_.end(), row.begin(), row.begin() + static_cast<long>(rails_.size()));
      ++num_;
    }
    last_ = &registration;
    return last_row_ = it->second;
  }
  ByteView bytes() const noexcept { return view_of(std::span<const uint32_t>(keys_)); }

 private:
  const Rails& rails_;
  std::unordered_map<const Registration*, uint32_t> known_;
  const Registration* last_ = nullptr;  // nearly always the next as well
  uint32_t last_row_ = 0, num_ = 0;
  std::vector<uint32_t> keys_;
};

}  // namespace kvxfer::verbs
