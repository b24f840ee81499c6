// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/spans.hpp"

#include <algorithm>
#include <numeric>

namespace kvxfer {
namespace {

// Half of int64: a sum of two such offsets and a length cannot overflow.
constexpr int64_t kMaxOffset = int64_t{1} << 61;
constexpr uint64_t kMaxSpans = uint64_t{1} << 26;

size_t common_length(std::initializer_list<std::pair<const char*, const Column*>> columns) {
  size_t length = 1;
  const char* from = nullptr;
  for (auto [name, column] : columns) {
    if (column->scalar) continue;
    if (from != nullptr && column->size != length)
      fail(Code::kInvalidArgument, name, " has ", column->size, " entries, but ", from, " has ",
           length, "; arrays must have one entry per span");
    if (from == nullptr) from = name, length = column->size;
  }
  return length;
}

void check_value(const char* what, size_t index, int64_t value, int64_t low) {
  if (value < low || value > kMaxOffset)
    fail(Code::kInvalidArgument, what, "[", index, "] = ", value, " is ",
         value < low ? (low > 0 ? "not positive" : "negative") : "too large");
}

struct Limits {
  int64_t min = kMaxOffset, max_end = 0;
};

[[noreturn]] void out_of_range(const char* side, const std::string& region, uint64_t region_nbytes,
                               uint64_t index, int64_t offset, int64_t nbytes) {
  fail(Code::kInvalidArgument, "span ", index, ": ", side, " offset ", offset, " + ", nbytes,
       " bytes = ", offset + nbytes, " is past the end of region '", region, "' (", region_nbytes,
       " bytes)");
}

struct Range {
  int64_t begin, end;
  uint64_t index;
};

void check_sorted(const std::vector<Range>& ranges, const Bounds& bounds) {
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin >= ranges[i - 1].end) continue;
    const Range &a = ranges[i - 1], &b = ranges[i];
    fail(Code::kInvalidArgument, "spans ", std::min(a.index, b.index), " and ",
         std::max(a.index, b.index), " overlap in the destination region '",
         bounds.destination_is_remote ? bounds.remote_name : bounds.local_name, "': [", a.begin,
         ", ", a.end, ") and [", b.begin, ", ", b.end, "); the result would depend on their order");
  }
}

// Ascending input, the common case, is checked without sorting.
void sort_and_check(std::vector<Range>& ranges, const Bounds& bounds) {
  auto by_begin = [](const Range& a, const Range& b) { return a.begin < b.begin; };
  if (!std::ranges::is_sorted(ranges, by_begin)) std::ranges::sort(ranges, by_begin);
  check_sorted(ranges, bounds);
}

}  // namespace

Expanded expand(const SpanArguments& arguments, const Bounds& bounds) {
  const auto& [local, remote, nbytes, bases, has_bases] = arguments;
  const size_t n =
      common_length({{"local_offsets", &local}, {"remote_offsets", &remote}, {"nbytes", &nbytes}});
  const size_t m = has_bases ? bases.size() / 2 : 1;
  if (m != 0 && n > kMaxSpans / m)
    fail(Code::kInvalidArgument, n, " spans x ", m, " bases are more than ", kMaxSpans,
         " in one transfer; split it");
  Limits local_limits, remote_limits;
  uint64_t template_nbytes = 0;
  for (size_t i = 0; i < n; ++i) {
    check_value("local_offsets", i, local[i], 0);
    check_value("remote_offsets", i, remote[i], 0);
    check_value("nbytes", i, nbytes[i], 1);
    local_limits.min = std::min(local_limits.min, local[i]);
    local_limits.max_end = std::max(local_limits.max_end, local[i] + nbytes[i]);
    remote_limits.min = std::min(remote_limits.min, remote[i]);
    remote_limits.max_end = std::max(remote_limits.max_end, remote[i] + nbytes[i]);
    // Within the regions' bounds (checked below) at most kMaxSpans x 2^61: the sum may still wrap
    // for overlapping sources, so it is bounded too.
    template_nbytes += static_cast<uint64_t>(nbytes[i]);
    if (template_nbytes > static_cast<uint64_t>(kMaxOffset))
      fail(Code::kInvalidArgument, "the spans add up to more than 2^61 bytes");
  }
  Expanded out;
  if (n == 0 || m == 0) return out;
  for (size_t b = 0; b < m; ++b) {
    const int64_t base_local = has_bases ? bases[2 * b] : 0,
                  base_remote = has_bases ? bases[2 * b + 1] : 0;
    if (has_bases) {
      check_value("bases[:, 0]", b, base_local, 0);
      check_value("bases[:, 1]", b, base_remote, 0);
    }
    auto beyond = [](int64_t base, const Limits& limits, uint64_t size) {
      return static_cast<uint64_t>(base + limits.max_end) > size;
    };
    if (beyond(base_local, local_limits, bounds.local_nbytes) ||
        beyond(base_remote, remote_limits, bounds.remote_nbytes)) {
      for (size_t i = 0; i < n; ++i) {  // name the first offender
        if (static_cast<uint64_t>(base_local + local[i] + nbytes[i]) > bounds.local_nbytes)
          out_of_range("local", bounds.local_name, bounds.local_nbytes, b * n + i,
                       base_local + local[i], nbytes[i]);
        if (static_cast<uint64_t>(base_remote + remote[i] + nbytes[i]) > bounds.remote_nbytes)
          out_of_range("remote", bounds.remote_name, bounds.remote_nbytes, b * n + i,
                       base_remote + remote[i], nbytes[i]);
      }
    }
  }

  // Overlap of destinations. The template first; the repeats only need their bases to be further
  // apart than the template is long, and else everything is sorted.
  const Column& to = bounds.destination_is_remote ? remote : local;
  const size_t side = bounds.destination_is_remote ? 1 : 0;
  std::vector<Range> ranges;
  ranges.reserve(n);
  for (size_t i = 0; i < n; ++i) ranges.push_back({to[i], to[i] + nbytes[i], i});
  sort_and_check(ranges, bounds);
  if (m > 1) {
    const Limits& limits = bounds.destination_is_remote ? remote_limits : local_limits;
    const int64_t length = limits.max_end - limits.min;
    std::vector<int64_t> sorted(m);
    for (size_t b = 0; b < m; ++b) sorted[b] = bases[2 * b + side];
    std::ranges::sort(sorted);
    bool apart = true;
    for (size_t b = 1; b < m; ++b) apart = apart && sorted[b] - sorted[b - 1] >= length;
    if (!apart) {
      ranges.clear();
      ranges.reserve(n * m);
      for (size_t b = 0; b < m; ++b)
        for (size_t i = 0; i < n; ++i) {
          const int64_t begin = bases[2 * b + side] + to[i];
          ranges.push_back({begin, begin + nbytes[i], b * n + i});
        }
      sort_and_check(ranges, bounds);
    }
  }

  out.spans.reserve(n * m);
  for (size_t b = 0; b < m; ++b) {
    const uint64_t base_local = has_bases ? static_cast<uint64_t>(bases[2 * b]) : 0;
    const uint64_t base_remote = has_bases ? static_cast<uint64_t>(bases[2 * b + 1]) : 0;
    for (size_t i = 0; i < n; ++i) {
      uint64_t from = base_local + static_cast<uint64_t>(local[i]);
      uint64_t into = base_remote + static_cast<uint64_t>(remote[i]);
      uint64_t left = static_cast<uint64_t>(nbytes[i]);
      out.nbytes += left;
      if (!out.spans.empty()) {  // neighbours on both sides become one
        Span& last = out.spans.back();
        if (last.local + last.nbytes == from && last.remote + last.nbytes == into &&
            last.nbytes + left <= kMaxSpanBytes) {
          last.nbytes += static_cast<uint32_t>(left);
          continue;
        }
      }
      while (left > 0) {
        const uint32_t take = static_cast<uint32_t>(std::min<uint64_t>(left, kMaxSpanBytes));
        out.spans.push_back({from, into, take, static_cast<uint32_t>(b * n + i)});
        from += take, into += take, left -= take;
      }
    }
  }
  return out;
}

std::vector<Extent> merge_extents(const Column& offsets, const Column& nbytes,
                                  const std::string& name, uint64_t region_nbytes) {
  const size_t n = common_length({{"offsets", &offsets}, {"nbytes", &nbytes}});
  std::vector<Extent> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    check_value("offsets", i, offsets[i], 0);
    check_value("nbytes", i, nbytes[i], 1);
    if (static_cast<uint64_t>(offsets[i] + nbytes[i]) > region_nbytes)
      out_of_range("granted", name, region_nbytes, i, offsets[i], nbytes[i]);
    out.push_back(
        {static_cast<uint64_t>(offsets[i]), static_cast<uint64_t>(offsets[i] + nbytes[i])});
  }
  std::ranges::sort(out, {}, &Extent::begin);
  size_t kept = 0;
  for (size_t i = 1; i < out.size(); ++i) {
    if (out[i].begin <= out[kept].end)
      out[kept].end = std::max(out[kept].end, out[i].end);
    else
      out[++kept] = out[i];
  }
  if (!out.empty()) out.resize(kept + 1);
  return out;
}

}  // namespace kvxfer
