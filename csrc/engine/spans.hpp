// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// From offset arrays to checked, coalesced spans.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transport/transport.hpp"

namespace kvxfer {

// An int, or an array: `stride` 0 repeats the one value.
struct Column {
  const int64_t* data = nullptr;
  size_t size = 1;
  bool scalar = true;
  int64_t operator[](size_t i) const noexcept { return data[scalar ? 0 : i]; }
};

struct SpanArguments {
  Column local, remote, nbytes;
  std::span<const int64_t> bases;  // pairs (local, remote); the span list is repeated at each
  bool has_bases = false;
};

struct Bounds {
  std::string local_name, remote_name;
  uint64_t local_nbytes = 0, remote_nbytes = 0;
  bool destination_is_remote = true;
};

struct Expanded {
  std::vector<Span> spans;
  uint64_t nbytes = 0;
};

// Throws kInvalidArgument naming the index, the expected and the given value, before anything is
// sent: lengths that disagree, negative, empty or out-of-range spans, overlapping destinations.
Expanded expand(const SpanArguments& arguments, const Bounds& bounds);

// Sorted and merged, for a lease; throws likewise.
std::vector<Extent> merge_extents(const Column& offsets, const Column& nbytes,
                                  const std::string& name, uint64_t region_nbytes);

}  // namespace kvxfer
