// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Whether the destinations of a request overlap, in time that grows with their
// number alone: by bitmap where they are equal slots, else by radix sort. (1024
// spans: std::sort takes 32 us, radix 5, a bitmap 1; a submit should cost 12 in
// all.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvxfer {

// An int, or an array with one entry per span.
struct Column {
  const int64_t* data = nullptr;
  size_t size = 1;
  bool scalar = true;
  int64_t operator[](size_t i) const noexcept { return data[scalar ? 0 : i]; }
};

// Two ranges that overlap, first < second: numbers in the caller's order.
struct Overlap {
  uint64_t first = 0, second = 0;
};

// Ranges [begins[i], begins[i] + nbytes[i]) for i < n; not negative, and no end
// beyond 2^62.
std::optional<Overlap> find_overlap(const Column& begins, const Column& nbytes, size_t n);

// The same n ranges repeated at each base: range b * n + i begins at bases[b] +
// begins[i].
std::optional<Overlap> find_overlap(const Column& begins, const Column& nbytes, size_t n,
                                    std::span<const int64_t> bases);

// Two entries that are equal: of ids, or of anything in [0, 2^62).
template <typename Id>
std::optional<Overlap> find_repeat(std::span<const Id> values);

}  // namespace kvxfer
