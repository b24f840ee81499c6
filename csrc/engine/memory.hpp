// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory that peers on this host can map to read, and only we can write: a sealed memfd, of huge
// pages where the pool has free ones.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "common/fd.hpp"
#include "transport/region.hpp"

namespace kvxfer {

struct Segment {
  Fd memfd;
  std::byte* base = nullptr;
  std::shared_ptr<void> mapping;  // unmaps with its last reference
  Backing backing;
};
Segment allocate_segment(size_t nbytes, const std::string& name);

}  // namespace kvxfer
