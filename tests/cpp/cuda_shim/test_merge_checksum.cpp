// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// merge_states and checksum_blocks on the CPU, against float64 and against plain loops.
#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "grid.hpp"
#include "guarded.hpp"
#include "kernels/checksum.hpp"
#include "kernels/cuda/kernels.hpp"
#include "numbers.hpp"

namespace cuda = kvxfer::kernels::cuda;
using cuda::Element;
using kvxfer::kernels::RowStrides;
using shim::Guarded;

TEST_CASE("merge: two states give what attending to both gives, also where one or both are empty") {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const Element type : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
    for (const int width : {64, 5}) {
      constexpr int64_t rows = 5, heads = 3;
      const auto size = static_cast<int64_t>(oracle::size_of(type));
      const auto count = static_cast<size_t>(rows * heads * width * size);
      Guarded<char> a(count), b(count), out(count);
      Guarded<float> lse_a(rows * heads), lse_b(rows * heads), lse(rows * heads);
      // a and the result lie row by row, b head by head.
      const auto of_b = [](int64_t unit) { return unit % heads * rows + unit / heads; };
      for (int64_t unit = 0; unit < rows * heads; ++unit) {
        lse_a[unit] = unit % 4 == 1 || unit == 6 ? -INFINITY : static_cast<float>(normal(random));
        lse_b[of_b(unit)] =
            unit % 5 == 2 || unit == 6 ? -INFINITY : static_cast<float>(normal(random));
        for (int64_t i = 0; i < width; ++i) {  // else NaN: never written
          if (lse_a[unit] != -INFINITY) {
            oracle::put(&a[(unit * width + i) * size], normal(random), type);
          }
          if (lse_b[of_b(unit)] != -INFINITY) {
            oracle::put(&b[(of_b(unit) * width + i) * size], normal(random), type);
          }
        }
      }
      cuda::Merge p{};
      p.v_a = a.data();
      p.v_b = b.data();
      p.lse_a = lse_a.data();
      p.lse_b = lse_b.data();
      p.out = out.data();
      p.lse = lse.data();
      p.a_row = heads * width;
      p.a_head = p.b_row = width;
      p.b_head = rows * width;
      p.lse_a_row = heads;
      p.lse_a_head = p.lse_b_row = 1;
      p.lse_b_head = rows;
      p.num_rows = rows;
      p.num_heads = static_cast<int32_t>(heads);
      p.width = width;
      p.type = type;
      cuda::merge_states(p, shim_a_stream());
      REQUIRE(shim_stream == shim_a_stream());
      const double eps = type == Element::kBFloat16  ? 0x1p-8
                         : type == Element::kFloat16 ? 0x1p-11
                                                     : 1e-6;
      for (int64_t unit = 0; unit < rows * heads; ++unit) {
        const double wa = std::exp(double{lse_a[unit]}), wb = std::exp(double{lse_b[of_b(unit)]});
        if (wa + wb == 0) {
          REQUIRE(lse[unit] == -INFINITY);
        } else {
          REQUIRE(std::fabs(lse[unit] - std::log(wa + wb)) < 1e-5);
        }
        for (int64_t i = 0; i < width; ++i) {
          const auto get = [&](Guarded<char>& from, int64_t number) {
            return oracle::get(&from[(number * width + i) * size], type);
          };
          const double from_a = wa > 0 ? wa * get(a, unit) : 0;
          const double from_b = wb > 0 ? wb * get(b, of_b(unit)) : 0;
          const double want = wa + wb > 0 ? (from_a + from_b) / (wa + wb) : 0;
          REQUIRE(std::fabs(get(out, unit) - want) <= eps * std::fabs(want) + 1e-6);
        }
      }
    }
  }
}

namespace {

// A cache of two parts in one layout, filled from the content that both layouts share.
struct Cache {
  int64_t layers, tokens, heads, row, block_size, gap;
  bool head_major;
  int64_t blocks = (tokens + block_size - 1) / block_size + 1;
  Guarded<char> memory{static_cast<size_t>(2 * layers * blocks * block_stride())};

  int64_t block_stride() const { return block_size * heads * (row + gap); }
  RowStrides strides() const {
    const int64_t step = row + gap;
    return head_major ? RowStrides{block_stride(), step, block_size * step}
                      : RowStrides{block_stride(), heads * step, step};
  }
  int64_t block_of(int64_t token) const { return blocks - 1 - token / block_size; }  // not in order
  char* base(int64_t part, int64_t layer) {
    return memory.data() + (part * layers + layer) * blocks * block_stride();
  }
  char* at(int64_t part, int64_t layer, int64_t token, int64_t head) {
    return base(part, layer) +
           kvxfer::kernels::row_offset(strides(), block_of(token), token % block_size, head);
  }
  void fill(const std::vector<char>& content) {
    size_t next = 0;
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (int64_t token = 0; token < tokens; ++token) {
          for (int64_t head = 0; head < heads; ++head, next += row) {
            std::memcpy(at(part, layer, token, head), &content[next], row);
          }
        }
      }
    }
  }
  std::vector<uint64_t> checksum() {
    std::vector<int64_t> bases, numbers, segments;
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t layer = 0; layer < layers; ++layer)
        bases.push_back(reinterpret_cast<int64_t>(base(part, layer)));
    }
    for (int64_t layer = 0; layer < layers; ++layer) numbers.push_back(10 + layer);
    for (int64_t token = 0; token < tokens; token += block_size) {
      segments.insert(segments.end(),
                      {block_of(token), 0, std::min(block_size, tokens - token), token});
    }
    Guarded<int64_t> b(bases), l(numbers), s(segments);
    Guarded<uint64_t> sums(std::vector<uint64_t>(layers, 0));
    cuda::Checksum p{};
    for (int i = 0; i < 2; ++i) p.part[i] = {strides(), static_cast<int32_t>(row), i};
    p.bases = b.data();
    p.layers = l.data();
    p.segments = s.data();
    p.sums = sums.data();
    p.num_parts = 2;
    p.num_layers = static_cast<int32_t>(layers);
    p.first_head = 4;
    p.num_heads = static_cast<int32_t>(heads);
    p.num_segments = static_cast<int64_t>(segments.size() / 4);
    cuda::checksum_blocks(p, shim_a_stream());
    REQUIRE(shim_stream == shim_a_stream());
    return sums.values();
  }
};

}  // namespace

TEST_CASE(
    "checksum: equal content agrees whatever the layout; each flip and swap shows in its layer") {
  std::mt19937 random(2);
  for (const int64_t row : {128, 24, 13}) {
    const int64_t layers = 2, tokens = 21, heads = 3;
    std::vector<char> content(static_cast<size_t>(2 * layers * tokens * heads * row));
    for (char& byte : content) byte = static_cast<char>(random());
    Cache one{layers, tokens, heads, row, 16, 0, false},
        other{layers, tokens, heads, row, 5, 3, true};
    one.fill(content);
    other.fill(content);
    std::vector<uint64_t> want(layers);
    size_t next = 0;
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (int64_t token = 0; token < tokens; ++token) {
          for (int64_t head = 0; head < heads; ++head, next += row) {
            std::vector<char> padded(&content[next], &content[next] + row);
            padded.resize((row + 7) / 8 * 8);
            uint64_t sum = 0;
            for (uint32_t pair = 0; pair < padded.size() / 8; ++pair) {
              uint32_t words[2];
              std::memcpy(words, &padded[pair * 8], 8);
              sum += kvxfer::kernels::hash_pair(words[0], words[1],
                                                kvxfer::kernels::hash_key(pair * 2),
                                                kvxfer::kernels::hash_key(pair * 2 + 1));
            }
            want[layer] += kvxfer::kernels::hash_row(sum, part, 10 + layer, 4 + head, token);
          }
        }
      }
    }
    CHECK(one.checksum() == want);
    CHECK(other.checksum() == want);
    one.at(1, 1, 20, 2)[row - 1] ^= 1;
    CHECK(one.checksum()[0] == want[0]);
    CHECK(one.checksum()[1] != want[1]);
    one.at(1, 1, 20, 2)[row - 1] ^= 1;
    std::swap_ranges(one.at(0, 0, 3, 0), one.at(0, 0, 3, 0) + row, one.at(0, 0, 4, 0));
    CHECK(one.checksum()[0] != want[0]);
  }
}

TEST_CASE("checksum: keys and mixing are splitmix64's, as its authors publish them from seed 0") {
  CHECK(kvxfer::kernels::mix64(0x9e3779b97f4a7c15u) == 0xe220a8397b1dcdafu);
  CHECK(kvxfer::kernels::hash_key(0) == 0xe220a839u);
  CHECK(kvxfer::kernels::hash_key(1) == 0x6e789e6au);
}
