// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which NUMA node a device and memory belong to, so that the NIC beside the memory is used.
#pragma once

#include <cstddef>
#include <string>

namespace kvxfer::verbs {

inline constexpr int kNoNode = -1;  // unknown, or more than one: everything is equally near

// Of the device whose folder in sysfs this is ("/sys/class/infiniband/mlx5_0"): device/numa_node.
int node_of_device(const std::string& sysfs);

// Of a PCI device, such as a GPU, by its address in sysfs ("0000:3b:00.0").
int node_of_pci(const std::string& bus_id, const std::string& devices = "/sys/bus/pci/devices");

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
