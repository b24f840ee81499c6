// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which of an engine's NICs some memory prefers: those that are nearest to it.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

class Preference {
 public:
  Preference() = default;                        // none: all are alike
  Preference(const Devices& devices, int node);  // of memory of the host
  // Of a GPU's, by its PCI address in sysfs; empty: unknown.
  Preference(const Devices& devices, const std::string& bus_id);

  // The larger the nearer.
  uint8_t rank(const Device& device) const noexcept { return ranks_[device.index()]; }
  // "prefers mlx5_1:1 (behind PCI bridge 0000:3a:01.0) to mlx5_0:1 (at NUMA node 0)"
  const std::string& text() const noexcept { return text_; }

 private:
  template <typename PlaceFor>
  void compare(const Devices& devices, PlaceFor place_for);

  std::array<uint8_t, kMaxRails> ranks_{};
  std::string text_;
};

}  // namespace kvxfer::verbs
