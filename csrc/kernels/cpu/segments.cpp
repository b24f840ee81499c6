// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/segments.hpp"

#include <algorithm>

#include "common/error.hpp"

namespace kvxfer::kernels::cpu {
namespace {

struct Cursor {
  const BlockList& list;
  int64_t index, slot;

  Cursor(const BlockList& blocks, int64_t token)
      : list(blocks),
        index((token - blocks.origin) / blocks.block_size),
        slot((token - blocks.origin) % blocks.block_size) {}
  int64_t left() const { return list.block_size - slot; }
  void advance(int64_t tokens) {
    slot += tokens;
    if (slot == list.block_size) slot = 0, ++index;
  }
  void check(int64_t id) const {
    if (id >= 0 && id < list.num_blocks) return;
    fail(Code::kInvalidArgument, list.name, "[", index, "]: expected a block id from 0 to ",
         list.num_blocks - 1, ", given ", id);
  }
};

void check_range(const BlockList& list, int64_t first, int64_t end) {
  if (list.block_size > 0 && list.origin <= first && first <= end &&
      (end - list.origin) <= list.count * list.block_size)
    return;
  fail(Code::kInvalidArgument, list.name, ": expected blocks for tokens ", first, " to ", end,
       ", given ", list.count, " blocks of ", list.block_size, " from token ", list.origin, " on");
}

// Ids below num_blocks: a bit for each is the fastest, unless there are far more blocks than ids.
bool any_twice(const std::vector<int64_t>& ids, int64_t num_blocks) {
  if (num_blocks / 256 > static_cast<int64_t>(ids.size())) {
    std::vector<int64_t> sorted = ids;
    std::sort(sorted.begin(), sorted.end());
    return std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
  }
  std::vector<uint64_t> seen(static_cast<size_t>(num_blocks / 64 + 1));
  for (const int64_t id : ids) {
    uint64_t& word = seen[static_cast<size_t>(id / 64)];
    const uint64_t bit = uint64_t{1} << (id % 64);
    if ((word & bit) != 0) return true;
    word |= bit;
  }
  return false;
}

void check_once(const BlockList& dst, std::vector<int64_t> ids) {
  if (!any_twice(ids, dst.num_blocks)) return;
  std::sort(ids.begin(), ids.end());
  const int64_t id = *std::adjacent_find(ids.begin(), ids.end());
  fail(Code::kInvalidArgument, dst.name, ": expected each block at most once, given ", id, " ",
       std::count(ids.begin(), ids.end(), id), " times");
}

void check_apart(const BlockList& dst, const std::vector<Segment>& segments) {
  constexpr size_t kShown = 8;
  std::vector<int64_t> read(segments.size()), both;
  std::transform(segments.begin(), segments.end(), read.begin(),
                 [](const Segment& s) { return s.src_block; });
  std::sort(read.begin(), read.end());
  for (const Segment& s : segments) {
    if (std::binary_search(read.begin(), read.end(), s.dst_block)) both.push_back(s.dst_block);
  }
  if (both.empty()) return;
  std::sort(both.begin(), both.end());
  both.erase(std::unique(both.begin(), both.end()), both.end());
  std::string shown;
  for (size_t i = 0; i < both.size() && i < kShown; ++i) {
    shown += (i == 0 ? "" : ", ") + std::to_string(both[i]);
  }
  fail(Code::kInvalidArgument, dst.name,
       ": expected blocks that are not read by the same copy, given [", shown, "]");
}

}  // namespace

std::vector<Segment> cut_segments(const BlockList& src, const BlockList& dst, int64_t first,
                                  int64_t end, bool apart) {
  std::vector<Segment> segments;
  check_range(src, first, end);
  check_range(dst, first, end);
  if (first == end) return segments;
  segments.reserve(
      static_cast<size_t>((end - first) / src.block_size + (end - first) / dst.block_size + 2));
  std::vector<int64_t> used;
  used.reserve(static_cast<size_t>((end - first) / dst.block_size + 2));
  Cursor from(src, first), to(dst, first);
  int64_t last_used = -1, target = 0;
  for (int64_t token = first; token < end;) {
    const int64_t tokens = std::min({from.left(), to.left(), end - token});
    if (to.index != last_used) {
      target = dst.ids[to.index];
      last_used = to.index;
      if (target != -1) used.push_back(target);
    }
    if (target != -1) {
      const int64_t source = src.ids[from.index];
      from.check(source);
      to.check(target);
      segments.push_back({source, from.slot, target, to.slot, tokens});
    }
    from.advance(tokens);
    to.advance(tokens);
    token += tokens;
  }
  check_once(dst, std::move(used));
  if (apart) check_apart(dst, segments);
  return segments;
}

}  // namespace kvxfer::kernels::cpu
