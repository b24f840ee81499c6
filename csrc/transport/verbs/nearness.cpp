// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/nearness.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>

#include "common/error.hpp"

namespace kvxfer::verbs {

namespace {
int node_in(const std::string& file) {
  std::ifstream in(file);
  int node = kNoNode;
  in >> node;  // the kernel says -1 where firmware tells nothing
  return in && node >= 0 ? node : kNoNode;
}
}  // namespace

int node_of_device(const std::string& sysfs) { return node_in(sysfs + "/device/numa_node"); }

int node_of_pci(const std::string& bus_id, const std::string& devices) {
  return bus_id.empty() ? kNoNode : node_in(cat(devices, "/", bus_id, "/numa_node"));
}

void NodeOfMemory::look_at(const std::byte* base, size_t nbytes) noexcept {
  constexpr size_t kLooks = 4;
  void* pages[kLooks];
  int nodes[kLooks];
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < kLooks; ++i) {
    const auto at = reinterpret_cast<uintptr_t>(base) + (nbytes - 1) / (kLooks - 1) * i;
    pages[i] = reinterpret_cast<void*>(at / page * page);
    nodes[i] = kNoNode;
  }
  if (::syscall(SYS_move_pages, 0, kLooks, pages, nullptr, nodes, 0) != 0) {
    differ_ = true;
    return;
  }
  for (const int node : nodes) {
    if (node < 0) continue;  // the errno of a page that is not there
    if (node_ != kNoNode && node != node_) differ_ = true;
    node_ = node;
  }
}

}  // namespace kvxfer::verbs
