// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Where NICs, GPUs and memory are in the machine, so that the NIC beside the memory is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvxfer::verbs {

inline constexpr int kNoNode = -1;  // unknown, or more than one: everything is equally near

struct Place {
  int node = kNoNode;
  // Of a PCI device, from the root complex over each bridge down to itself: "pci0000:3a",
  // "0000:3a:01.0", "0000:3b:00.0". Empty: it is none (memory of the host), or unknown.
  std::vector<std::string> path{};
  std::string text() const;
};

// Of the device with this folder in sysfs, which may be a link
// ("/sys/class/infiniband/mlx5_0/device").
Place place_of(const std::string& folder);

// How near two places are. Whatever hangs below a bridge of PCIe is nearer to its like than to what
// is reached through the root complex; that is nearer than another root complex at the same node.
struct Nearness {
  // The larger the nearer. 0: nothing in common that is known; 1: the node; 2: the root complex;
  // one more for each bridge.
  uint8_t rank = 0;
  std::string what;  // they have in common, in words
};
Nearness nearness(const Place& nic, const Place& memory);

// Of memory whose pages are present, by looking at some of them (move_pages, which moves none).
// Containers may forbid the call; then it is unknown.
class NodeOfMemory {
 public:
  void look_at(const std::byte* base, size_t nbytes) noexcept;
  int node() const noexcept { return differ_ ? kNoNode : node_; }

 private:
  int node_ = kNoNode;
  bool differ_ = false;
};

}  // namespace kvxfer::verbs
