// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The block copy and append kernels' own sources, thread by thread on the CPU, against byte
// oracles.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "grid.hpp"
#include "guarded.hpp"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/ptx.cuh"
#include "numbers.hpp"

namespace cuda = kvxfer::kernels::cuda;
using cuda::Element;
using kvxfer::kernels::RowStrides;
using oracle::size_of;
using shim::Guarded;

namespace {

// One side of a copy: cache [layer, block, (token, head) in either order, row], gaps in between.
struct Side {
  int64_t layers, blocks, block_size, heads, row;
  bool head_major;
  int64_t gap;  // bytes after each row

  RowStrides strides() const {
    const int64_t step = row + gap;
    return head_major ? RowStrides{block_size * heads * step, step, block_size * step}
                      : RowStrides{block_size * heads * step, heads * step, step};
  }
  int64_t layer_bytes() const { return blocks * strides().block; }
  size_t nbytes() const { return static_cast<size_t>(layers * layer_bytes()); }
};

int64_t access_of(std::initializer_list<const Side*> sides) {
  int64_t access = 16;
  for (const Side* side : sides) {
    const RowStrides s = side->strides();
    for (const int64_t n : {s.block, s.token, s.head, side->row, side->layer_bytes()}) {
      access = kvxfer::kernels::widen_access(access, n);
    }
  }
  return access;
}

// Whole and partial blocks: {src block, slot, dst block, slot, tokens}.
std::vector<int64_t> segments_for(std::mt19937& random, const Side& src, const Side& dst) {
  std::vector<int64_t> order(static_cast<size_t>(dst.blocks)), segments;
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random);
  for (size_t i = 0; i + 1 < order.size(); ++i) {  // one block stays as it was
    const int64_t room = std::min(src.block_size, dst.block_size);
    const int64_t tokens = 1 + static_cast<int64_t>(random() % room);
    const int64_t from = static_cast<int64_t>(random() % (src.block_size - tokens + 1));
    const int64_t to = static_cast<int64_t>(random() % (dst.block_size - tokens + 1));
    segments.insert(segments.end(),
                    {static_cast<int64_t>(random() % src.blocks), from, order[i], to, tokens});
  }
  return segments;
}

// The tables move into the launch's own parameters.
void travel_with_the_launch(cuda::Copy& p) {
  unsigned char* at = p.tables;
  const auto put = [&](const void* from, size_t nbytes) {
    REQUIRE(at + nbytes <= p.tables + sizeof(p.tables));
    std::memcpy(at, from, nbytes);
    at += nbytes;
  };
  const auto layers = static_cast<size_t>(p.num_parts) * static_cast<size_t>(p.num_layers);
  put(p.bases, layers * 2 * sizeof(int64_t));
  put(p.segments, static_cast<size_t>(p.num_segments) * 5 * sizeof(int64_t));
  if (p.scaled) put(p.scales, layers * static_cast<size_t>(p.num_heads) * 2 * sizeof(float));
  p.bases = p.segments = nullptr;
  p.scales = nullptr;
}

// Every row of the copy by plain loops; `row` writes one.
template <class Row>
void each_row(const cuda::Copy& p, Row row) {
  for (int64_t part = 0; part < p.num_parts; ++part) {
    for (int64_t layer = 0; layer < p.num_layers; ++layer) {
      for (int64_t i = 0; i < p.num_segments; ++i) {
        const int64_t* s = p.segments + i * 5;
        for (int64_t token = 0; token < s[4]; ++token) {
          for (int64_t head = 0; head < p.num_heads; ++head) {
            const RowStrides &a = p.part[part].src, &b = p.part[part].dst;
            row(part, layer, head, s[0] * a.block + (s[1] + token) * a.token + head * a.head,
                s[2] * b.block + (s[3] + token) * b.token + head * b.head);
          }
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("a block copy moves every byte of every row, and no other") {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int64_t> of) {
    return of.begin()[random() % of.size()];
  };
  for (int round = 0; round < 60 * oracle::num_seeds(); ++round) {
    shim::set_seed(random());
    const int64_t layers = pick({1, 2, 3}), heads = pick({1, 2, 5}),
                  unit = pick({16, 16, 8, 4, 2, 1});
    const int64_t row = unit * pick({1, 3, 16});
    const Side src{layers, 5, pick({1, 3, 16}), heads, row, random() % 2 == 0, unit * pick({0, 1})};
    const Side dst{layers, 4, pick({1, 4, 16}), heads, row, random() % 2 == 0, unit * pick({0, 2})};
    Guarded<char> from(src.nbytes()), to(dst.nbytes());
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<char>(random());
    const Guarded<int64_t> segments(segments_for(random, src, dst));
    std::vector<int64_t> bases;
    for (int64_t layer = 0; layer < layers; ++layer) {
      bases.push_back(reinterpret_cast<int64_t>(from.data()) + layer * src.layer_bytes());
      bases.push_back(reinterpret_cast<int64_t>(to.data()) + layer * dst.layer_bytes());
    }
    Guarded<int64_t> table(bases);
    cuda::Copy p{};
    p.part[0] = {src.strides(), dst.strides(), static_cast<int32_t>(row)};
    p.bases = table.data();
    const std::vector<int64_t> listed = segments.values();
    p.segments = listed.data();
    p.num_parts = 1;
    p.num_layers = static_cast<int32_t>(layers);
    p.num_heads = static_cast<int32_t>(heads);
    p.num_segments = static_cast<int64_t>(listed.size() / 5);
    p.access = static_cast<int32_t>(access_of({&src, &dst}));
    p.max_ctas = static_cast<int32_t>(pick({0, 1, 3}));
    const cuda::Copy described = p;
    if (random() % 2) travel_with_the_launch(p);
    std::vector<char> want = to.values();
    each_row(described, [&](int64_t, int64_t layer, int64_t, int64_t a, int64_t b) {
      std::memcpy(&want[layer * dst.layer_bytes() + b], from.data() + layer * src.layer_bytes() + a,
                  row);
    });
    cuda::copy_rows(p, shim_a_stream());
    REQUIRE(shim_stream == shim_a_stream());
    REQUIRE(to.values() == want);
    if (p.max_ctas > 0) CHECK(shim::last_grid_size() <= static_cast<uint64_t>(p.max_ctas));
  }
}

TEST_CASE("a converting copy rounds, scales by layer and head, and saturates fp8") {
  std::mt19937 random(2);
  std::normal_distribution<double> normal(0, 200);
  const Element all[] = {Element::kFloat32, Element::kFloat16, Element::kBFloat16, Element::kE4m3};
  for (const Element from : all) {
    for (const Element to : all) {
      for (const int64_t width : {16, 48, 8, 5}) {  // in the widest steps, and one by one
        for (const bool scaled : {false, true}) {
          if (from == to && (from != Element::kE4m3 || !scaled)) continue;
          shim::set_seed(random());
          const int64_t heads = 3, layers = 2, block_size = 4;
          const auto in = static_cast<int64_t>(size_of(from)),
                     out = static_cast<int64_t>(size_of(to));
          const Side src{2 * layers, 3, block_size, heads, width * in, false, 0};  // two parts
          const Side dst{2 * layers, 3, block_size, heads, width * out, true, 0};
          Guarded<char> source(src.nbytes()), target(dst.nbytes());
          for (size_t i = 0; i < source.size(); i += in)
            oracle::put(&source[i], random() % 9 == 0 ? -0.0 : normal(random), from);
          std::vector<int64_t> bases;
          std::vector<float> scales;
          for (int64_t entry = 0; entry < 2 * layers; ++entry) {
            bases.push_back(reinterpret_cast<int64_t>(source.data()) + entry * src.layer_bytes());
            bases.push_back(reinterpret_cast<int64_t>(target.data()) + entry * dst.layer_bytes());
            for (int64_t head = 0; head < heads; ++head) {
              scales.push_back(0.5f + static_cast<float>(random() % 7));
              scales.push_back(0.3f + static_cast<float>(random() % 5));
            }
          }
          Guarded<int64_t> table(bases), segments(segments_for(random, src, dst));
          Guarded<float> factors(scales);
          cuda::Copy p{};
          p.part[0] = p.part[1] = {src.strides(), dst.strides(), static_cast<int32_t>(width)};
          p.bases = table.data();
          p.segments = segments.data();
          p.scales = scaled ? factors.data() : nullptr;
          p.scaled = scaled;
          p.num_parts = 2;
          p.num_layers = static_cast<int32_t>(layers);
          p.num_heads = static_cast<int32_t>(heads);
          p.num_segments = static_cast<int64_t>(segments.size() / 5);
          p.access = static_cast<int32_t>(access_of({&src, &dst}));
          p.convert = true;
          p.from = from;
          p.to = to;
          const cuda::Copy listed = p;
          if (random() % 2) travel_with_the_launch(p);
          std::vector<char> want = target.values();
          each_row(listed, [&](int64_t part, int64_t layer, int64_t head, int64_t a, int64_t b) {
            const int64_t entry = part * layers + layer;
            const float* factor = &scales[(entry * heads + head) * 2];
            for (int64_t i = 0; i < width; ++i) {
              auto value = static_cast<float>(
                  oracle::get(source.data() + entry * src.layer_bytes() + a + i * in, from));
              if (scaled) value = value * factor[0] / factor[1];
              oracle::put(&want[entry * dst.layer_bytes() + b + i * out], value, to);
            }
          });
          cuda::copy_rows(p, shim_a_stream());
          REQUIRE(shim_stream == shim_a_stream());
          REQUIRE(target.values() == want);
        }
      }
    }
  }
}

TEST_CASE("a quotient by a corrected reciprocal is the quotient") {
  std::mt19937 random(9);
  std::uniform_int_distribution<uint32_t> fraction(0, (1u << 23) - 1), exponent(127 - 40, 127 + 40);
  for (int round = 0; round < 3'000'000; ++round) {
    const float divisor = __uint_as_float(exponent(random) << 23 | fraction(random));
    uint32_t bits =
        exponent(random) << 23 | fraction(random) | (static_cast<uint32_t>(random()) & 1u) << 31;
    if (round % 3 == 0) bits &= 0xffff0000u;  // what bfloat16 holds
    const float x = __uint_as_float(bits);
    const float got = cuda::divide(x, cuda::divider_of(divisor, true));
    if (got != x / divisor) {
      FAIL("x = ", x, ", divisor = ", divisor, ": ", got, " and not ", x / divisor);
    }
  }
  const cuda::Divider by = cuda::divider_of(3.0f, true);
  for (const float x : {0.0f, -0.0f, INFINITY, -INFINITY}) {
    CHECK(__float_as_uint(cuda::divide(x, by)) == __float_as_uint(x / 3.0f));
  }
  CHECK(std::isnan(cuda::divide(NAN, by)));
}

TEST_CASE("tables on the device may lie in one piece") {
  cuda::Copy p{};
  p.num_parts = 2;
  p.num_layers = 3;
  p.num_segments = 7;
  std::vector<int64_t> memory(100);
  cuda::place_tables(p, memory.data());
  CHECK(p.bases == memory.data());
  CHECK(p.segments == memory.data() + 12);
  CHECK(p.scales == nullptr);
  p.scaled = true;
  cuda::place_tables(p, memory.data());
  CHECK(static_cast<const void*>(p.scales) == memory.data() + 12 + 35);
}

TEST_CASE("append writes the rows of its slots, converted, and leaves the rest alone") {
  std::mt19937 random(3);
  std::normal_distribution<double> normal(0, 30);
  const Element all[] = {Element::kFloat32, Element::kFloat16, Element::kBFloat16, Element::kE4m3};
  for (const Element from : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
    for (const Element to : all) {
      for (const int64_t width : {16, 64, 7}) {
        for (const bool head_major : {false, true}) {
          shim::set_seed(random());
          const int64_t tokens = 11, heads = 3, block_size = 5, blocks = 4;
          const auto in = static_cast<int64_t>(size_of(from)),
                     out = static_cast<int64_t>(size_of(to));
          // K and V of unequal width, rows with a gap, V's cache behind K's in one row (fused).
          const int64_t widths[] = {width, width + (width == 7 ? 2 : 16)};
          const int64_t row = (widths[0] + widths[1]) * out;
          Guarded<char> cache(static_cast<size_t>(blocks * block_size * heads * row));
          const RowStrides strides =
              head_major ? RowStrides{block_size * heads * row, row, block_size * row}
                         : RowStrides{block_size * heads * row, heads * row, row};
          Guarded<char> k(static_cast<size_t>(tokens * heads * widths[0] * in));
          Guarded<char> v(static_cast<size_t>(tokens * heads * widths[1] * in));
          for (Guarded<char>* rows : {&k, &v}) {
            for (size_t i = 0; i < rows->size(); i += in)
              oracle::put(&(*rows)[i], normal(random), from);
          }
          std::vector<int64_t> slots(blocks * block_size);
          for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
          std::shuffle(slots.begin(), slots.end(), random);
          slots.resize(tokens);
          slots[2] = slots[7] = -1;
          Guarded<int64_t> mapping(slots);
          cuda::Append p{};
          const float scales[] = {random() % 2 ? 1.0f : 0.75f, random() % 2 ? 1.0f : 3.0f};
          const char* sources[] = {k.data(), v.data()};
          for (int i = 0; i < 2; ++i) {
            p.part[i] = {sources[i],
                         cache.data() + (i == 0 ? 0 : widths[0] * out),
                         {0, heads * widths[i] * in, widths[i] * in},
                         strides,
                         static_cast<int32_t>(widths[i]),
                         scales[i]};
          }
          p.slots = mapping.data();
          p.num_tokens = tokens;
          p.block_size = block_size;
          p.num_kv_heads = static_cast<int32_t>(heads);
          p.from = from;
          p.to = to;
          std::vector<char> want = cache.values();
          for (int64_t token = 0; token < tokens; ++token) {
            if (slots[token] < 0) continue;
            for (int i = 0; i < 2; ++i) {
              for (int64_t head = 0; head < heads; ++head) {
                const int64_t at = slots[token] / block_size * strides.block +
                                   slots[token] % block_size * strides.token + head * strides.head +
                                   (i == 0 ? 0 : widths[0] * out);
                for (int64_t c = 0; c < widths[i]; ++c) {
                  const auto value = static_cast<float>(oracle::get(
                      sources[i] + ((token * heads + head) * widths[i] + c) * in, from));
                  oracle::put(&want[at + c * out], value / scales[i], to);
                }
              }
            }
          }
          cuda::append_kv(p, shim_a_stream());
          REQUIRE(shim_stream == shim_a_stream());
          REQUIRE(cache.values() == want);
        }
      }
    }
  }
}

TEST_CASE("offsets past 2^33 bytes are exact in append and copy") {
  // 20 GiB of address space, a few pages of memory.
  const int64_t heads = 2, width = 64, block_size = 16, row = width * 2;
  const RowStrides strides{block_size * heads * row, heads * row, row};
  const int64_t blocks = (int64_t{20} << 30) / strides.block, last = blocks - 1;
  REQUIRE(last * strides.block > (int64_t{1} << 33));
  Guarded<char> cache(static_cast<size_t>(blocks * strides.block)),
      near(static_cast<size_t>(strides.block));
  Guarded<uint16_t> rows(heads * width);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint16_t>(i);
  Guarded<int64_t> slots(std::vector<int64_t>{last * block_size + 15});
  cuda::Append append{};
  append.part[0] =
      append.part[1] = {rows.data(), cache.data(), {0, heads * row, row}, strides, width, 1};
  append.slots = slots.data();
  append.num_tokens = 1;
  append.block_size = block_size;
  append.num_kv_heads = heads;
  append.from = append.to = Element::kFloat16;
  cuda::append_kv(append, nullptr);
  const char* far = cache.data() + last * strides.block + 15 * strides.token;
  CHECK(std::memcmp(far, rows.data(), heads * row) == 0);

  Guarded<int64_t> segments(std::vector<int64_t>{last, 15, 0, 3, 1});
  Guarded<int64_t> bases(std::vector<int64_t>{reinterpret_cast<int64_t>(cache.data()),
                                              reinterpret_cast<int64_t>(near.data())});
  cuda::Copy copy{};
  copy.part[0] = {strides, strides, static_cast<int32_t>(row)};
  copy.bases = bases.data();
  copy.segments = segments.data();
  copy.num_parts = copy.num_layers = 1;
  copy.num_heads = heads;
  copy.num_segments = 1;
  copy.access = 16;
  cuda::copy_rows(copy, nullptr);
  CHECK(std::memcmp(near.data() + 3 * strides.token, rows.data(), heads * row) == 0);
}

TEST_CASE("fp8 in software is fp8 by definition, for every code and around every rounding") {
  namespace kernels = kvxfer::kernels;
  for (int code = 0; code < 256; ++code) {
    const float want = shim::e4m3_value(static_cast<uint32_t>(code));
    const float got = kernels::e4m3_to_float({static_cast<uint8_t>(code)});
    REQUIRE((std::isnan(want) ? std::isnan(got) : got == want));
    REQUIRE(std::signbit(got) == (code >= 128));
    if (std::isnan(want)) continue;
    REQUIRE(oracle::decode(static_cast<uint32_t>(code), Element::kE4m3) == want);
    const uint32_t halves = kernels::e4m3x2_to_half2_over_256(static_cast<uint32_t>(code) << 8);
    REQUIRE(oracle::decode(halves >> 16, Element::kFloat16) * 256 == want);
    REQUIRE((halves & 0xffff) == 0);
  }
  const auto same = [](float value) {
    REQUIRE(kernels::float_to_e4m3(value).bits == cuda::narrow_e4m3(value).bits);
    REQUIRE(kernels::float_to_e4m3(value).bits == oracle::encode(value, Element::kE4m3));
  };
  for (uint32_t half = 0; half < 0x7c00; ++half) {  // fp16 holds every code and every middle of two
    const auto value = static_cast<float>(oracle::decode(half, Element::kFloat16));
    for (const float near : {std::nextafter(value, -1e9f), value, std::nextafter(value, 1e9f)}) {
      same(near);
      same(-near);
    }
  }
  same(1e30f);
  same(1e-30f);
  same(INFINITY);
  CHECK((kernels::float_to_e4m3(NAN).bits & 0x7f) == 0x7f);
}
