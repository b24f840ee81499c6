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
