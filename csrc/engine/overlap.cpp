// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/overlap.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace kvxfer {
namespace {

constexpr int kDigitBits = 11;
constexpr size_t kSmall = 64;  // below, clearing a histogram costs more than comparing

struct Entry {
  uint64_t key;
  uint64_t index;
};

void sort(std::vector<Entry>& entries, uint64_t max_key) {
  if (entries.size() <= kSmall) {
    std::ranges::sort(entries, {}, &Entry::key);
    return;
  }
  std::vector<Entry> other(entries.size());
  for (int shift = 0; shift < 64 && max_key >> shift != 0; shift += kDigitBits) {
    std::array<size_t, size_t{1} << kDigitBits> start{};
    const auto digit = [shift](const Entry& e) {
      return static_cast<size_t>(e.key >> shift) & ((size_t{1} << kDigitBits) - 1);
    };
    for (const Entry& e : entries) ++start[digit(e)];
    size_t sum = 0;
    for (size_t& s : start) sum += std::exchange(s, sum);
    for (const Entry& e : entries) other[start[digit(e)]++] = e;
    entries.swap(other);
  }
}

// What is known of begins after one look: they all are min + a multiple of
// 2^shift.
struct Grid {
  int64_t min = 0, max = 0;
  int shift = 0;
  bool ascending = true;  // strictly
  uint64_t key(int64_t value) const noexcept { return static_cast<uint64_t>(value - min) >> shift; }
  uint64_t max_key() const noexcept { return key(max); }
};

template <typename Values>
Grid look(const Values& values, size_t n) {
  Grid grid{.min = values[0], .max = values[0]};
  uint64_t differences = 0;
  int64_t last = values[0];
  for (size_t i = 1; i < n; ++i) {
    const int64_t value = values[i];
    grid.ascending &= value > last;
    differences |= static_cast<uint64_t>(value - last);
    grid.min = std::min(grid.min, value);
    grid.max = std::max(grid.max, value);
    last = value;
  }
  grid.shift = differences == 0 ? 0 : std::countr_zero(differences);
  return grid;
}

// Worth a bitmap: clearing it costs less than sorting would.
bool dense(const Grid& grid, size_t n) { return grid.max_key() / 256 <= n; }

template <typename Values>
bool all_different(const Values& values, size_t n, const Grid& grid) {
  std::vector<uint64_t> seen(grid.max_key() / 64 + 1);
  uint64_t twice = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t key = grid.key(values[i]), bit = uint64_t{1} << (key % 64);
    twice |= seen[key / 64] & bit;
    seen[key / 64] |= bit;
  }
  return twice == 0;
}

template <typename Values>
std::vector<Entry> sorted(const Values& values, size_t n, const Grid& grid) {
  std::vector<Entry> entries(n);
  for (size_t i = 0; i < n; ++i) entries[i] = {grid.key(values[i]), i};
  if (!grid.ascending) sort(entries, grid.max_key());
  return entries;
}

Overlap pair_of(uint64_t a, uint64_t b) { return {std::min(a, b), std::max(a, b)}; }

int64_t longest(const Column& nbytes, size_t n) {
  return nbytes.scalar ? nbytes[0] : *std::max_element(nbytes.data, nbytes.data + n);
}

std::optional<Overlap> first_overlap(const std::vector<Entry>& entries, const Column& begins,
                                     const Column& nbytes) {
  for (size_t i = 1; i < entries.size(); ++i) {
    const uint64_t a = entries[i - 1].index, b = entries[i].index;
    if (begins[a] + nbytes[a] > begins[b]) return pair_of(a, b);
  }
  return {};
}

// The smallest distance between two begins; n > 1.
int64_t closest(const Column& begins, size_t n) {
  const Grid grid = look(begins, n);
  const std::vector<Entry> entries = sorted(begins, n, grid);
  uint64_t gap = ~uint64_t{0};
  for (size_t i = 1; i < n; ++i) gap = std::min(gap, entries[i].key - entries[i - 1].key);
  return static_cast<int64_t>(gap << grid.shift);
}

// Whether repeating a template without overlaps at `bases` is seen to be
// harmless without looking at each repeat: bases that are nearer to each other
// than the template is long form a cluster (parts and layers of one block,
// say), and within a cluster all of it must fit between two begins.
bool harmless(const Column& begins, const Column& nbytes, size_t n,
              std::span<const int64_t> bases) {
  int64_t low = begins[0], high = 0;
  for (size_t i = 0; i < n; ++i) {
    low = std::min(low, begins[i]);
    high = std::max(high, begins[i] + nbytes[i]);
  }
  const int64_t length = high - low, most = longest(nbytes, n);
  const Column column{bases.data(), bases.size(), false};
  const Grid grid = look(column, bases.size());
  const std::vector<Entry> order = sorted(column, bases.size(), grid);
  int64_t extent = 0, first = bases[order[0].index], last = first;
  for (size_t b = 1; b < order.size(); ++b) {
    const int64_t base = bases[order[b].index];
    if (base - last < most) return false;
    if (base - last >= length) first = base;
    extent = std::max(extent, base - first);
    last = base;
  }
  return extent == 0 || n == 1 || closest(begins, n) >= extent + most;
}

}  // namespace

std::optional<Overlap> find_overlap(const Column& begins, const Column& nbytes, size_t n) {
  if (n < 2) return {};
  if (begins.scalar) return Overlap{0, 1};
  const Grid grid = look(begins, n);
  if (grid.ascending) {
    for (size_t i = 1; i < n; ++i)
      if (begins[i - 1] + nbytes[i - 1] > begins[i]) return Overlap{i - 1, i};
    return {};
  }
  const bool slots = uint64_t{1} << grid.shift >= static_cast<uint64_t>(longest(nbytes, n));
  if (slots && dense(grid, n) && all_different(begins, n, grid)) return {};
  return first_overlap(sorted(begins, n, grid), begins, nbytes);
}

std::optional<Overlap> find_overlap(const Column& begins, const Column& nbytes, size_t n,
                                    std::span<const int64_t> bases) {
  if (n == 0 || bases.empty()) return {};
  if (auto within = find_overlap(begins, nbytes, n)) return within;
  if (bases.size() == 1 || harmless(begins, nbytes, n, bases)) return {};
  std::vector<int64_t> all, sizes;
  all.reserve(n * bases.size());
  sizes.reserve(n * bases.size());
  for (const int64_t base : bases)
    for (size_t i = 0; i < n; ++i) all.push_back(base + begins[i]), sizes.push_back(nbytes[i]);
  return find_overlap({all.data(), all.size(), false}, {sizes.data(), sizes.size(), false},
                      all.size());
}

template <typename Id>
std::optional<Overlap> find_repeat(std::span<const Id> values) {
  const size_t n = values.size();
  if (n < 2) return {};
  const Grid grid = look(values, n);
  if (grid.ascending || (dense(grid, n) && all_different(values, n, grid))) return {};
  const std::vector<Entry> entries = sorted(values, n, grid);
  for (size_t i = 1; i < n; ++i)
    if (entries[i].key == entries[i - 1].key)
      return pair_of(entries[i - 1].index, entries[i].index);
  return {};
}
template std::optional<Overlap> find_repeat(std::span<const int32_t>);
template std::optional<Overlap> find_repeat(std::span<const int64_t>);

}  // namespace kvxfer
