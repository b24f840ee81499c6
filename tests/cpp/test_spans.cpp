// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// From offset arrays to spans, against a plain oracle.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "common/error.hpp"
#include "engine/spans.hpp"

using namespace kvxfer;

namespace {

Column column(const std::vector<int64_t>& v) { return {v.data(), v.size(), false}; }
Column scalar(const int64_t& v) { return {&v, 1, true}; }
Bounds bounds(uint64_t nbytes, bool to_remote = true) {
  return {"here", "there", nbytes, nbytes, to_remote};
}

std::string message(const SpanArguments& a, const Bounds& b) {
  try {
    expand(a, b);
  } catch (const Error& error) {
    CHECK(error.code == Code::kInvalidArgument);
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("neighbours on both sides become one span, and remember the first index") {
  const std::vector<int64_t> local{0, 10, 20, 50}, remote{100, 110, 130, 160};
  const int64_t size = 10;
  const Expanded out =
      expand({column(local), column(remote), scalar(size), {}, false}, bounds(1000));
  REQUIRE(out.spans.size() == 3);
  CHECK(out.spans[0].nbytes == 20);
  CHECK(out.spans[1].index == 2);
  CHECK(out.spans[2].index == 3);
  CHECK(out.nbytes == 40);
}

TEST_CASE("a span longer than a descriptor can say is cut") {
  const int64_t zero = 0, size = (int64_t{5} << 30) + 3;
  const Expanded out =
      expand({scalar(zero), scalar(zero), scalar(size), {}, false}, bounds(uint64_t{6} << 30));
  CHECK(out.spans.size() == 6);
  CHECK(out.spans.back().nbytes == 3);
  CHECK(out.spans.back().index == 0);
}

TEST_CASE("each bad argument is refused with its index and values") {
  const std::vector<int64_t> three{0, 100, 200}, two{0, 100}, overlapping{0, 100, 105},
      negative{0, -1, 5};
  const int64_t ten = 10, zero = 0, huge = int64_t{1} << 62;
  auto spans = [](Column l, Column r, Column n) { return SpanArguments{l, r, n, {}, false}; };
  CHECK(has(message(spans(column(three), column(two), scalar(ten)), bounds(1000)),
            "remote_offsets has 2 entries"));
  CHECK(has(message(spans(column(three), column(overlapping), scalar(ten)), bounds(1000)),
            "spans 1 and 2 overlap in the destination region 'there'"));
  CHECK(message(spans(column(overlapping), column(three), scalar(ten)), bounds(1000)) ==
        "");  // sources may
  CHECK(has(message(spans(column(overlapping), column(three), scalar(ten)), bounds(1000, false)),
            "overlap in the destination region 'here'"));
  CHECK(has(message(spans(column(negative), column(three), scalar(ten)), bounds(1000)),
            "local_offsets[1] = -1"));
  CHECK(has(message(spans(column(three), column(three), scalar(zero)), bounds(1000)),
            "nbytes[0] = 0"));
  CHECK(has(
      message(spans(column(three), column(three), scalar(ten)), bounds(205)),
      "span 2: local offset 200 + 10 bytes = 210 is past the end of region 'here' (205 bytes)"));
  CHECK(has(message(spans(scalar(huge), scalar(zero), scalar(ten)), bounds(1000)), "too large"));
  const std::vector<int64_t> bases{0, 0, 0, 5};
  CHECK(has(message({column(three), column(three), scalar(ten), bases, true}, bounds(1000)),
            "overlap"));
  const std::vector<int64_t> far{0, 0, 0, 900};
  CHECK(has(message({column(three), column(three), scalar(ten), far, true}, bounds(1000)),
            "span 4: remote"));
}

TEST_CASE("random requests agree with a byte-by-byte oracle") {
  std::mt19937 rng(7);
  auto draw = [&](int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); };
  int refused = 0, taken = 0;
  for (int round = 0; round < 3000; ++round) {
    const size_t n = static_cast<size_t>(draw(6) + 1), m = static_cast<size_t>(draw(4));
    std::vector<int64_t> local, remote, size, bases;
    for (size_t i = 0; i < n; ++i)
      local.push_back(draw(60)), remote.push_back(draw(60)), size.push_back(draw(8) + 1);
    for (size_t i = 0; i < 2 * m; ++i) bases.push_back(draw(8) * 64);
    const bool with_bases = m > 0, to_remote = rng() % 2;
    const uint64_t limit = 512;
    std::map<int64_t, int64_t> expected;  // destination byte -> source byte
    bool valid = true;
    for (size_t b = 0; b < std::max<size_t>(m, 1); ++b)
      for (size_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < size[i]; ++k) {
          const int64_t l = local[i] + k + (with_bases ? bases[2 * b] : 0);
          const int64_t r = remote[i] + k + (with_bases ? bases[2 * b + 1] : 0);
          if (l >= static_cast<int64_t>(limit) || r >= static_cast<int64_t>(limit)) valid = false;
          if (!expected.emplace(to_remote ? r : l, to_remote ? l : r).second) valid = false;
        }
    const SpanArguments arguments{column(local), column(remote), column(size), bases, with_bases};
    try {
      const Expanded out = expand(arguments, bounds(limit, to_remote));
      CHECK(valid);
      ++taken;
      std::map<int64_t, int64_t> got;
      for (const Span& s : out.spans)
        for (uint32_t k = 0; k < s.nbytes; ++k) {
          const auto l = static_cast<int64_t>(s.local + k), r = static_cast<int64_t>(s.remote + k);
          got.emplace(to_remote ? r : l, to_remote ? l : r);
        }
      CHECK(got == expected);
    } catch (const Error&) {
      CHECK_FALSE(valid);
      ++refused;
    }
  }
  CHECK(refused > 100);
  CHECK(taken > 100);
}

TEST_CASE("extents of a lease are sorted and merged") {
  const std::vector<int64_t> offsets{50, 0, 10, 55};
  const int64_t ten = 10;
  const auto out = merge_extents(column(offsets), scalar(ten), "kv", 100);
  REQUIRE(out.size() == 2);
  CHECK(out[0].begin == 0);
  CHECK(out[0].end == 20);
  CHECK(out[1].begin == 50);
  CHECK(out[1].end == 65);
}

TEST_CASE("an overlap is found wherever comparing each pair finds one, at any size") {
  std::mt19937 rng(11);
  auto draw = [&](int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); };
  int found = 0, clean = 0;
  for (int round = 0; round < 1500; ++round) {
    // Beyond 64 spans the radix sort runs, on a grid of equal slots the bitmap.
    const size_t n = static_cast<size_t>(draw(round % 3 == 0 ? 200 : 20) + 1);
    const size_t m = static_cast<size_t>(draw(5) + 1);
    const int64_t grid = int64_t{1} << draw(8), longest = draw(4) == 0 ? 3 * grid : grid;
    const int64_t room = static_cast<int64_t>(n) * (draw(3) + 1) * (draw(4) == 0 ? 4000 : 1);
    std::vector<int64_t> begins, sizes, bases;
    for (size_t i = 0; i < n; ++i) begins.push_back(draw(room) * grid * (draw(2) + 1));
    if (draw(2) == 0) std::ranges::shuffle(begins, rng);
    if (draw(3) == 0) {  // all different
      for (size_t i = 0; i < n; ++i) begins[i] = static_cast<int64_t>(i) * grid * 4;
      if (draw(2) == 0) std::ranges::shuffle(begins, rng);
    }
    for (size_t i = 0; i < n; ++i) sizes.push_back(draw(longest) + 1);
    const int64_t step = draw(2) == 0 ? grid : room * grid * 2;
    for (size_t b = 0; b < m; ++b) bases.push_back(draw(8) * step + draw(2) * grid);
    struct Range {
      int64_t begin, end;
    };
    std::vector<Range> ranges;
    for (int64_t base : bases)
      for (size_t i = 0; i < n; ++i)
        ranges.push_back({base + begins[i], base + begins[i] + sizes[i]});
    bool expected = false;
    for (size_t i = 0; i < ranges.size() && !expected; ++i)
      for (size_t j = 0; j < i && !expected; ++j)
        expected = ranges[i].begin < ranges[j].end && ranges[j].begin < ranges[i].end;
    const auto which = find_overlap(column(begins), column(sizes), n, bases);
    REQUIRE(which.has_value() == expected);
    if (which) {
      ++found;
      REQUIRE(which->first < which->second);
      const Range &a = ranges.at(which->first), &b = ranges.at(which->second);
      CHECK(a.begin < b.end);
      CHECK(b.begin < a.end);
    } else {
      ++clean;
    }
  }
  CHECK(found > 100);
  CHECK(clean > 100);
}

TEST_CASE("layers inside a block, and parts inside a layer, do not need a look at each repeat") {
  // [layer][block][k, v]: bases are near each other in pairs and far apart between pairs.
  std::vector<int64_t> begins, bases;
  for (int64_t i = 0; i < 300; ++i) begins.push_back((i * 7919 % 300) * 64);
  for (int64_t layer = 0; layer < 4; ++layer)
    for (int64_t part = 0; part < 2; ++part) bases.push_back(layer * 300 * 64 + part * 32);
  const int64_t fits = 32, too_long = 33;
  CHECK_FALSE(find_overlap(column(begins), scalar(fits), 300, bases));
  CHECK(find_overlap(column(begins), scalar(too_long), 300, bases));
}

namespace {

BlockIds ids(const std::vector<int64_t>& v) { return {v.data(), v.size(), true}; }
BlockIds ids(const std::vector<int32_t>& v) { return {v.data(), v.size(), false}; }

std::string message(const BlockArguments& a, const Bounds& b) {
  try {
    expand(a, b);
  } catch (const Error& error) {
    CHECK(error.code == Code::kInvalidArgument);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("blocks that are neighbours on both sides become one span, also across layers") {
  const std::vector<int64_t> here{3, 4, 5, 9};
  const std::vector<int32_t> there{0, 1, 2, 4};
  const BlockView pool{.base = 64, .block_stride = 16, .nbytes = 16};
  Expanded out = expand({pool, pool, ids(here), ids(there)}, bounds(1000));
  REQUIRE(out.spans.size() == 2);
  CHECK(out.spans[0].local == 64 + 3 * 16);
  CHECK(out.spans[0].remote == 64);
  CHECK(out.spans[0].nbytes == 48);
  CHECK(out.spans[1].index == 3);
  CHECK(out.num_given == 4);

  BlockView inside = pool;  // the layers of a block side by side
  inside.block_stride = 64, inside.num_layers = 4, inside.layer_stride = 16;
  out = expand({inside, inside, ids(here), ids(here)}, bounds(1000));
  REQUIRE(out.spans.size() == 2);
  CHECK(out.spans[0].nbytes == 3 * 64);
  CHECK(out.num_given == 16);
  CHECK(out.nbytes == 4 * 64);
}

TEST_CASE("each bad block request is refused with its index and values") {
  const std::vector<int64_t> good{0, 1, 2}, repeated{4, 1, 4}, negative{0, -1, 2}, far{0, 1, 100},
      two{0, 1};
  const BlockView pool{.base = 0, .block_stride = 10, .nbytes = 10};
  auto refused = [&](const std::vector<int64_t>& from, const std::vector<int64_t>& into,
                     BlockView local, BlockView remote, bool to_remote = true) {
    return message({local, remote, ids(from), ids(into)}, bounds(1000, to_remote));
  };
  CHECK(refused(repeated, good, pool, pool) == "");  // sources may repeat
  CHECK(has(refused(good, repeated, pool, pool),
            "remote_blocks[0] and remote_blocks[2] are both block 4"));
  CHECK(has(refused(repeated, good, pool, pool, false),
            "local_blocks[0] and local_blocks[2] are both block 4"));
  CHECK(has(refused(good, negative, pool, pool), "remote_blocks[1] = -1 is negative"));
  CHECK(has(refused(far, good, pool, pool),
            "local_blocks[2] = 100 is past the end of region 'here' (1000 bytes), whose largest "
            "block in this view is 99"));
  CHECK(has(refused(two, good, pool, pool), "remote_blocks has 3 entries, but local_blocks has 2"));
  BlockView other = pool;
  other.nbytes = 5;
  CHECK(has(refused(good, good, pool, other), "views disagree: remote_view has nbytes 5"));
  other = pool, other.base = 995;
  CHECK(has(refused(good, good, other, pool), "local_view: block 0 of 1 layer(s) ends past"));
  other = pool, other.nbytes = 0;
  CHECK(has(refused(good, good, other, other), "local_view.nbytes = 0"));
  other = pool, other.num_layers = int64_t{1} << 40;
  CHECK(has(refused(good, good, other, other), "split it"));
  other = pool, other.block_stride = 5;
  CHECK(has(refused(good, good, pool, other), "blocks 0 (layer 0) and 1 (layer 0) overlap"));
}

TEST_CASE("random block requests agree with a byte-by-byte oracle") {
  std::mt19937 rng(13);
  auto draw = [&](int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); };
  int refused = 0, taken = 0;
  for (int round = 0; round < 4000; ++round) {
    const size_t n = static_cast<size_t>(draw(6));
    const int64_t nbytes = draw(6) + 1, layers = draw(3) + 1, limit = 256;
    auto view = [&] {
      return BlockView{draw(20), draw(12), nbytes, layers, draw(2) ? draw(12) : draw(80)};
    };
    const BlockView local = view(), remote = view();
    std::vector<int64_t> from;
    std::vector<int32_t> into;
    for (size_t i = 0; i < n; ++i)
      from.push_back(draw(13) - (draw(60) == 0)), into.push_back(static_cast<int32_t>(draw(13)));
    const bool to_remote = rng() % 2;
    std::map<int64_t, int64_t> expected;
    // A view must hold its block 0.
    auto holds = [&](const BlockView& v) {
      return v.base + (layers - 1) * v.layer_stride + nbytes <= limit;
    };
    bool valid = holds(local) && holds(remote);
    for (int64_t layer = 0; layer < layers; ++layer)
      for (size_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < nbytes; ++k) {
          const int64_t l =
              local.base + layer * local.layer_stride + from[i] * local.block_stride + k;
          const int64_t r =
              remote.base + layer * remote.layer_stride + into[i] * remote.block_stride + k;
          valid = valid && from[i] >= 0 && l < limit && r < limit;
          if (!expected.emplace(to_remote ? r : l, to_remote ? l : r).second) valid = false;
        }
    try {
      const Expanded out = expand({local, remote, ids(from), ids(into)}, bounds(limit, to_remote));
      CHECK(valid);
      ++taken;
      std::map<int64_t, int64_t> got;
      for (const Span& s : out.spans)
        for (uint32_t k = 0; k < s.nbytes; ++k) {
          const auto l = static_cast<int64_t>(s.local + k), r = static_cast<int64_t>(s.remote + k);
          got.emplace(to_remote ? r : l, to_remote ? l : r);
        }
      CHECK(got == expected);
    } catch (const Error&) {
      CHECK_FALSE(valid);
      ++refused;
    }
  }
  CHECK(refused > 100);
  CHECK(taken > 100);
}

TEST_CASE("lists of large requests are used again, and no more is kept than was said") {
  SpanPool pool;
  const auto room = [&pool](size_t n) { return pool.take(n).capacity(); };

  std::vector<Span> list(SpanPool::kLeast);
  const Span* where = list.data();
  pool.give(std::move(list));
  CHECK(room(SpanPool::kLeast - 1) == 0);  // the allocator's own affair
  CHECK(room(SpanPool::kLeast + 1) == 0);  // too short
  CHECK(pool.take(SpanPool::kLeast).data() == where);
  CHECK(room(SpanPool::kLeast) == 0);  // it is out

  // When all places are taken, longer lists drive out the shortest.
  for (size_t i = 0; i < SpanPool::kMostLists; ++i)
    pool.give(std::vector<Span>(SpanPool::kLeast + i));
  pool.give(std::vector<Span>(SpanPool::kLeast));
  pool.give(std::vector<Span>(2 * SpanPool::kLeast));
  size_t kept = 0;
  while (room(SpanPool::kLeast + 1) != 0) ++kept;
  CHECK(kept == SpanPool::kMostLists);

  pool.give(std::vector<Span>(SpanPool::kMostSpans + 1));
  CHECK(room(SpanPool::kMostSpans) == 0);
  for (int i = 0; i < 3; ++i) pool.give(std::vector<Span>(SpanPool::kMostSpans / 2));
  CHECK(room(SpanPool::kLeast) != 0);
  CHECK(room(SpanPool::kLeast) != 0);
  CHECK(room(SpanPool::kLeast) == 0);
}
