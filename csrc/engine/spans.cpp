// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Offset arrays; blocks.cpp is the same for ids of blocks.
#include "engine/spans.hpp"

#include <algorithm>

namespace kvxfer {
namespace {

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

[[noreturn]] void out_of_range(const char* side, std::string_view region, uint64_t region_nbytes,
                               uint64_t index, int64_t offset, int64_t nbytes) {
  fail(Code::kInvalidArgument, "span ", index, ": ", side, " offset ", offset, " + ", nbytes,
       " bytes = ", offset + nbytes, " is past the end of region '", region, "' (", region_nbytes,
       " bytes)");
}

[[noreturn]] void overlapping(const SpanArguments& a, const Bounds& bounds, size_t n,
                              const Overlap& which) {
  const Column& to = bounds.destination_is_remote ? a.remote : a.local;
  const size_t side = bounds.destination_is_remote ? 1 : 0;
  auto begin = [&](uint64_t index) {
    return to[index % n] + (a.has_bases ? a.bases[2 * (index / n) + side] : 0);
  };
  auto range = [&](uint64_t index) {
    return cat("[", begin(index), ", ", begin(index) + a.nbytes[index % n], ")");
  };
  fail(Code::kInvalidArgument, "spans ", which.first, " and ", which.second,
       " overlap in the destination region '",
       bounds.destination_is_remote ? bounds.remote_name : bounds.local_name,
       "': ", range(which.first), " and ", range(which.second),
       "; the result would depend on their order");
}

struct Array {
  const int64_t* data;
  int64_t operator[](size_t i) const noexcept { return data[i]; }
};
struct Same {
  int64_t value;
  int64_t operator[](size_t) const noexcept { return value; }
};

// Calls f(local, remote, nbytes) with columns whose kind the compiler knows, for those kinds that
// requests of many spans have: it saves a third of the time of a loop over them.
template <typename F>
void with_kinds(const SpanArguments& a, F&& f) {
  if (a.local.scalar || a.remote.scalar)
    f(a.local, a.remote, a.nbytes);
  else if (a.nbytes.scalar)
    f(Array{a.local.data}, Array{a.remote.data}, Same{a.nbytes[0]});
  else
    f(Array{a.local.data}, Array{a.remote.data}, Array{a.nbytes.data});
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
  // One pass without a branch: a value that is negative or too large shows in
  // the upper bits.
  uint64_t bits = 0;
  int64_t local_end = 0, remote_end = 0;
  with_kinds(arguments, [&](const auto& locals, const auto& remotes, const auto& sizes) {
    uint64_t seen = 0;
    int64_t local_last = 0, remote_last = 0;
    for (size_t i = 0; i < n; ++i) {
      const auto l = static_cast<uint64_t>(locals[i]), r = static_cast<uint64_t>(remotes[i]),
                 size = static_cast<uint64_t>(sizes[i]);
      seen |= l | r | (size - 1);
      local_last = std::max(local_last, static_cast<int64_t>(l + size));
      remote_last = std::max(remote_last, static_cast<int64_t>(r + size));
    }
    bits = seen, local_end = local_last, remote_end = remote_last;
  });
  if (bits >= static_cast<uint64_t>(kMaxOffset)) {
    for (size_t i = 0; i < n; ++i) {  // name the first offender
      check_value("local_offsets", i, local[i], 0);
      check_value("remote_offsets", i, remote[i], 0);
      check_value("nbytes", i, nbytes[i], 1);
    }
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
    if (static_cast<uint64_t>(base_local + local_end) > bounds.local_nbytes ||
        static_cast<uint64_t>(base_remote + remote_end) > bounds.remote_nbytes) {
      for (size_t i = 0; i < n; ++i) {
        if (static_cast<uint64_t>(base_local + local[i] + nbytes[i]) > bounds.local_nbytes)
          out_of_range("local", bounds.local_name, bounds.local_nbytes, b * n + i,
                       base_local + local[i], nbytes[i]);
        if (static_cast<uint64_t>(base_remote + remote[i] + nbytes[i]) > bounds.remote_nbytes)
          out_of_range("remote", bounds.remote_name, bounds.remote_nbytes, b * n + i,
                       base_remote + remote[i], nbytes[i]);
      }
    }
  }

  if (n * m > 1) {
    const Column& to = bounds.destination_is_remote ? remote : local;
    std::vector<int64_t> repeats(m);
    for (size_t b = 0; b < m; ++b)
      repeats[b] = has_bases ? bases[2 * b + (bounds.destination_is_remote ? 1 : 0)] : 0;
    if (auto which = find_overlap(to, nbytes, n, repeats))
      overlapping(arguments, bounds, n, *which);
  }

  out.num_given = n * m;
  with_kinds(arguments, [&](const auto& locals, const auto& remotes, const auto& sizes) {
    SpanBuilder builder(out, n * m);
    for (size_t b = 0; b < m; ++b) {
      const uint64_t base_local = has_bases ? static_cast<uint64_t>(bases[2 * b]) : 0;
      const uint64_t base_remote = has_bases ? static_cast<uint64_t>(bases[2 * b + 1]) : 0;
      for (size_t i = 0; i < n; ++i)
        builder.add(base_local + static_cast<uint64_t>(locals[i]),
                    base_remote + static_cast<uint64_t>(remotes[i]),
                    static_cast<uint64_t>(sizes[i]), static_cast<uint32_t>(b * n + i));
    }
    builder.finish();
  });
  return out;
}

std::vector<Extent> merged(std::vector<Extent> extents) {
  std::ranges::sort(extents, {}, &Extent::begin);
  size_t kept = 0;
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin <= extents[kept].end)
      extents[kept].end = std::max(extents[kept].end, extents[i].end);
    else
      extents[++kept] = extents[i];
  }
  if (!extents.empty()) extents.resize(kept + 1);
  return extents;
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
  return merged(std::move(out));
}

}  // namespace kvxfer
