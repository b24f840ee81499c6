// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/nearness.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
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

Place place_of(const std::string& folder) {
  Place out{.node = node_in(folder + "/numa_node")};
  // The kernel names folders as devices are wired:
  // /sys/devices/pci0000:3a/0000:3a:01.0/0000:3b:00.0.
  std::error_code none;
  for (const auto& part : std::filesystem::canonical(folder, none))
    if (!out.path.empty() || part.native().starts_with("pci")) out.path.push_back(part.native());
  return out;
}

std::string Place::text() const {
  std::string out = cat("NUMA node ", node < 0 ? "unknown" : cat(node));
  for (size_t i = 0; i < path.size(); ++i) out += (i == 0 ? ", PCI " : "/") + path[i];
  return out;
}

Nearness nearness(const Place& nic, const Place& memory) {
  // The last of a path is the device itself, which is no bridge to anything.
  const auto end = [](const Place& place) {
    return place.path.end() - (place.path.empty() ? 0 : 1);
  };
  const auto differ =
      std::mismatch(nic.path.begin(), end(nic), memory.path.begin(), end(memory)).first;
  const auto shared = std::min<ptrdiff_t>(differ - nic.path.begin(), 250);
  if (shared > 1)
    return {static_cast<uint8_t>(1 + shared), cat("behind PCI bridge ", *(differ - 1))};
  if (shared == 1) return {2, cat("under root complex ", nic.path.front())};
  if (nic.node >= 0 && nic.node == memory.node) return {1, cat("at NUMA node ", nic.node)};
  return {};
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
