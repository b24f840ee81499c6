// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/segments.hpp"
#include "kernels/cpu/thread_pool.hpp"
#include "kernels/index_math.hpp"

using namespace kvxfer::kernels;
using kvxfer::Error;

namespace kvxfer::kernels::cpu {
namespace wide {
extern const IsaTable kTable;
}
}  // namespace kvxfer::kernels::cpu

TEST_CASE("offsets past 2^33 are exact") {
  const RowStrides strides{16 * 8 * 128, 8 * 128, 128};
  const int64_t block = (int64_t{1} << 33) / strides.block + 12'345;
  CHECK(row_offset(strides, block, 15, 7) == block * 16384 + 15 * 1024 + 7 * 128);
  CHECK(row_offset(strides, block, 15, 7) > (int64_t{1} << 33));
  const int64_t slot = (int64_t{1} << 40) + 5;
  const SlotPosition at = split_slot(slot, 24);
  CHECK(at.block * 24 + at.offset == slot);
  CHECK(at.offset < 24);
}

TEST_CASE("a divisor found once divides as a division does") {
  std::mt19937 random(3);
  for (int32_t d = 1; d <= 4096; d += d < 300 ? 1 : 77) {
    const Divisor by(d);
    for (const int32_t n : {0, 1, d - 1, d, d + 1, 2 * d - 1, INT32_MAX - 1, INT32_MAX}) {
      REQUIRE(by.quotient(n) == n / d);
    }
    for (int round = 0; round < 200; ++round) {
      const auto n = static_cast<int32_t>(random() >> 1);
      REQUIRE(by.quotient(n) == n / d);
      REQUIRE(by.quotient(n / d * d) == n / d);
    }
  }
}

TEST_CASE("a window begins at its first key, and never before 0") {
  CHECK(window_begin(100, -1) == 0);
  CHECK(window_begin(100, 0) == 100);
  CHECK(window_begin(100, 100) == 0);
  CHECK(window_begin(100, 99) == 1);
  CHECK(window_begin(3, 1000) == 0);
}

TEST_CASE("collapsed runs cover exactly the rows, whatever the strides") {
  std::mt19937 random(7);
  const auto pick = [&](std::initializer_list<int64_t> of) {
    return of.begin()[random() % of.size()];
  };
  for (int round = 0; round < 2000; ++round) {
    const int64_t row = 4, tokens = pick({1, 2, 5}), heads = pick({1, 2, 3});
    const auto side = [&] {
      const bool token_major = random() % 2 == 0;
      const int64_t gap = pick({0, 0, 4});
      return token_major ? RowStrides{0, heads * row + gap, row}
                         : RowStrides{0, row, tokens * row + gap};
    };
    const RowStrides src = side(), dst = side();
    std::vector<char> from(400), want(400, -1), got(400, -1);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<char>(i % 100);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        std::memcpy(&want[t * dst.token + h * dst.head], &from[t * src.token + h * src.head], row);
      }
    }
    const RunShape shape = collapse_rows(row, tokens, heads, src, dst);
    for (int64_t i = 0; i < shape.outer; ++i) {
      for (int64_t j = 0; j < shape.inner; ++j) {
        std::memcpy(&got[i * shape.dst_outer + j * shape.dst_inner],
                    &from[i * shape.src_outer + j * shape.src_inner], shape.run);
      }
    }
    REQUIRE(got == want);
  }
}

TEST_CASE("blocks beyond 2^33 elements are written and read where they are") {
  // 40 GiB of address space, a few pages of memory.
  const int64_t num_blocks = 40'000, block_size = 16, heads = 4,
                dim = 1024;  // 2.6e9 elements per 10 GiB
  const int64_t elements = num_blocks * 4 * block_size * heads * dim;
  void* memory = mmap(nullptr, static_cast<size_t>(elements) * 4, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    MESSAGE("skipped: this machine does not lend 40 GiB of address space");
    return;
  }
  REQUIRE(elements > (int64_t{1} << 33));
  std::vector<float> key(heads * dim), out(heads * dim);
  for (size_t i = 0; i < key.size(); ++i) key[i] = static_cast<float>(i % 97);
  const cpu::Cache cache{memory, DType::kFloat32, {block_size * heads * dim, heads * dim, dim}};
  const int64_t last = num_blocks * 4 - 1, slot = last * block_size + 15;
  cpu::Append append;
  append.key = append.value = {key.data(), DType::kFloat32, heads * dim, dim};
  append.k = append.v = cache;
  append.slots = &slot;
  append.num_tokens = 1;
  append.num_kv_heads = heads;
  append.head_dim = append.head_dim_v = dim;
  append.num_blocks = num_blocks * 4;
  append.block_size = block_size;
  cpu::append_kv(append);
  const auto* far =
      static_cast<const float*>(memory) + last * cache.strides.block + 15 * cache.strides.token;
  CHECK(std::equal(key.begin(), key.end(), far));

  const auto table = static_cast<int32_t>(last);
  const int32_t length = 16;
  cpu::Attention a;
  a.q = {key.data(), DType::kFloat32, heads * dim, dim};
  a.out = {out.data(), DType::kFloat32, heads * dim, dim};
  a.k = a.v = cache;
  a.block_table = &table;
  a.table_stride = a.max_blocks = 1;
  a.seq_lens = &length;
  a.batch = 1;
  a.num_q_heads = a.num_kv_heads = heads;
  a.head_dim = a.head_dim_v = dim;
  a.num_blocks = num_blocks * 4;
  a.block_size = block_size;
  a.window_left = 0;  // only the slot just written
  cpu::paged_decode(a);
  CHECK(out == key);
  munmap(memory, static_cast<size_t>(elements) * 4);
}

TEST_CASE("sixteen lanes give what eight or four give") {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  const auto sixteen = [](const std::vector<float>& values) {
    std::vector<uint16_t> bits(1);  // so that rows are not even on 4 bytes
    for (const float value : values)
      bits.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
    return bits;
  };
  for (const int64_t dim : {8, 24, 64, 100}) {
    for (const auto& [group, dtype] : {std::pair<int64_t, DType>{1, DType::kFloat32},
                                       {2, DType::kFloat32},
                                       {5, DType::kFloat32},
                                       {9, DType::kFloat32},
                                       {1, DType::kBFloat16},
                                       {4, DType::kBFloat16},
                                       {11, DType::kBFloat16},
                                       {8, DType::kFloat8E4M3}}) {
      const int64_t heads = 2, block_size = 7, length = 150, num_new = 61,
                    blocks = (length + 6) / 7;
      std::vector<float> k(blocks * block_size * heads * dim), v(k.size());
      std::vector<float> q(num_new * heads * group * dim), want(q.size()), got(q.size());
      for (auto* values : {&k, &v, &q}) {
        for (float& value : *values) value = normal(random);
      }
      std::vector<uint16_t> k16 = sixteen(k), v16 = sixteen(v);
      std::vector<uint8_t> k8(k.size()), v8(k.size());  // e4m3 below 2, subnormals too
      for (auto* codes : {&k8, &v8}) {
        for (uint8_t& code : *codes) code = static_cast<uint8_t>(random() & 0xbf);
      }
      const auto data = [&, kind = dtype](auto& wide, auto& half, auto& byte) -> void* {
        if (kind == DType::kFloat32) return wide.data();
        return kind == DType::kBFloat16 ? static_cast<void*>(half.data() + 1) : byte.data();
      };
      std::vector<int32_t> table(blocks);
      for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<int32_t>(blocks - 1 - i);
      const int32_t cu[] = {0, static_cast<int32_t>(num_new)},
                    seq_len = static_cast<int32_t>(length);
      std::vector<float> sinks(heads * group, 0.5f);
      cpu::Attention a;
      a.q = {q.data(), DType::kFloat32, heads * group * dim, dim};
      a.k = {data(k, k16, k8), dtype, {block_size * heads * dim, dim, block_size * dim}};
      a.v = {data(v, v16, v8), dtype, a.k.strides};
      a.block_table = table.data();
      a.table_stride = a.max_blocks = blocks;
      a.seq_lens = &seq_len;
      a.cu_seqlens_q = cu;
      a.sinks = sinks.data();
      a.batch = 1;
      a.num_q_heads = heads * group;
      a.num_kv_heads = heads;
      a.head_dim = a.head_dim_v = dim;
      a.num_blocks = blocks;
      a.block_size = block_size;
      a.sm_scale = 0.3f;
      a.logits_soft_cap = 8;
      a.window_left = 90;
      a.out = {want.data(), DType::kFloat32, heads * group * dim, dim};
      cpu::set_isa("baseline");
      cpu::paged_prefill(a);
      cpu::set_isa(cpu::available_isas().front());

      const cpu::IsaTable& wide = cpu::wide::kTable;
      a.out.data = got.data();
      std::vector<char> scratch(wide.prefill_scratch(a) + wide.decode_scratch(a) + 64);
      void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) &
                                              ~uintptr_t{63});
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t row = 0; row < num_new * group; row += cpu::kTileRows) {
          wide.prefill(a, {0, head, row, std::min(num_new * group, row + cpu::kTileRows)}, aligned);
        }
      }
      for (size_t i = 0; i < got.size(); ++i)
        REQUIRE(got[i] == doctest::Approx(want[i]).epsilon(1e-4).scale(1));

      // The last row again, as a decode step of two splits.
      const int64_t stride = cpu::partial_stride(dim), last = (num_new - 1) * heads * group * dim;
      std::vector<float> partials(2 * heads * group * stride);
      const int64_t begin = length - 1 - 90;
      wide.decode(a, {0, num_new - 1, begin, 100, 0, heads, partials.data()}, aligned);
      wide.decode(a,
                  {0, num_new - 1, 100, length, 0, heads, partials.data() + heads * group * stride},
                  aligned);
      std::fill(got.begin() + last, got.end(), 0.0f);
      for (int64_t h = 0; h < heads * group; ++h) {
        wide.finish(a, num_new - 1, h, partials.data() + h * stride, 2, heads * group * stride,
                    aligned);
      }
      for (size_t i = last; i < got.size(); ++i)
        REQUIRE(got[i] == doctest::Approx(want[i]).epsilon(1e-4).scale(1));
    }
  }
}

TEST_CASE("the pool runs every index once, and hands on the first exception") {
  cpu::set_num_threads(4);
  std::vector<std::atomic<int>> seen(1000);
  cpu::parallel_for(1000, 100, true, [&](int64_t i, void* scratch) {
    std::memset(scratch, 0, 100);
    ++seen[static_cast<size_t>(i)];
  });
  for (const auto& each : seen) CHECK(each == 1);
  CHECK_THROWS_AS(cpu::parallel_for(100, 0, true,
                                    [](int64_t i, void*) {
                                      if (i == 50) kvxfer::fail(kvxfer::Code::kInternal, "fifty");
                                    }),
                  Error);
  int64_t inside = 0;  // a body may itself ask for the pool: it works alone then
  cpu::parallel_for(1, 0, true, [&](int64_t, void*) {
    cpu::parallel_for(10, 0, true, [&](int64_t i, void*) { inside += i; });
  });
  CHECK(inside == 45);
}

TEST_CASE("a walk visits every (token, head, vector) once, in order") {
  for (const int32_t heads : {1, 3, 8}) {
    for (const int32_t vectors : {1, 5, 16}) {
      for (const int64_t stride : {1, 7, 32, 256}) {
        std::vector<int> seen(20 * heads * vectors);
        for (int64_t start = 0; start < stride; ++start) {
          RowWalk walk(heads, vectors, start, stride);
          for (int64_t flat = start; walk.token < 20; walk.advance(), flat += stride) {
            REQUIRE((walk.token * heads + walk.head) * vectors + walk.vector == flat);
            ++seen[static_cast<size_t>(flat)];
          }
        }
        for (const int each : seen) REQUIRE(each == 1);
      }
    }
  }
}

TEST_CASE("a walk's offsets pass 2^33 exactly") {
  RowWalk walk(4, 8, 0, 4 * 8);
  for (int i = 0; i < 9; ++i) walk.advance();
  CHECK(walk.offset({0, int64_t{1} << 31, 128}, 16) == 9 * (int64_t{1} << 31));
}

TEST_CASE("an access is as wide as every address allows") {
  CHECK(widen_access(16, 256) == 16);
  CHECK(widen_access(16, 24) == 8);
  CHECK(widen_access(8, 16) == 8);
  CHECK(widen_access(16, 3) == 1);
  CHECK(widen_access(16, 0) == 16);
}

TEST_CASE("segments cover the tokens once, and a copy moves their rows and no other byte") {
  constexpr int64_t kOff = 1;  // no row begins on a word
  std::mt19937 random(7);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  for (int round = 0; round < 200; ++round) {
    const int64_t first = below(30), end = first + below(60), heads = 1 + below(3),
                  row = below(3) == 0 ? 64 * (1 + below(20)) : 1 + below(300);
    struct Side {
      std::vector<int64_t> ids;
      cpu::BlockList list{};
      RowStrides strides{};
      std::vector<char> memory;
    } sides[2];
    for (Side& side : sides) {
      const int64_t size = 1 + below(9), origin = below(2) == 0 ? 0 : first;
      const int64_t count = (end - origin + size - 1) / size, blocks = count + below(3) + 1;
      for (int64_t i = 0; i < blocks; ++i) side.ids.push_back(i);
      std::shuffle(side.ids.begin(), side.ids.end(), random);
      side.ids.resize(static_cast<size_t>(count));
      side.list = {"blocks", side.ids.data(), count, size, blocks, origin};
      const bool head_major = below(2) == 0;
      side.strides = {size * heads * row, head_major ? row : heads * row,
                      head_major ? size * row : row};
      side.memory.resize(static_cast<size_t>(kOff + blocks * size * heads * row));
      for (char& byte : side.memory) byte = static_cast<char>(random());
    }
    Side &src = sides[0], &dst = sides[1];
    if (!dst.ids.empty() && below(2) == 0)
      dst.ids[static_cast<size_t>(below(static_cast<int64_t>(dst.ids.size())))] = -1;
    std::vector<char> want = dst.memory;
    for (int64_t token = first; token < end; ++token) {
      const auto at = [&](const Side& side, int64_t head) {
        const int64_t index = (token - side.list.origin) / side.list.block_size;
        const int64_t slot = (token - side.list.origin) % side.list.block_size;
        const int64_t id = side.ids[static_cast<size_t>(index)];
        return id < 0 ? -1 : kOff + row_offset(side.strides, id, slot, head);
      };
      for (int64_t head = 0; head < heads; ++head) {
        if (at(dst, head) < 0) continue;
        std::copy_n(src.memory.begin() + at(src, head), row, want.begin() + at(dst, head));
      }
    }
    const auto segments = cpu::cut_segments(src.list, dst.list, first, end, false);
    const cpu::CopyBase base{0, kOff, 0, kOff};
    cpu::CopyPart part;
    part.bases = &base;
    part.row_bytes = row;
    part.src = src.strides;
    part.dst = dst.strides;
    const auto from = reinterpret_cast<uintptr_t>(src.memory.data());
    const auto to = reinterpret_cast<uintptr_t>(dst.memory.data());
    cpu::copy_rows(
        {&part, 1, 1, heads, &from, &to, segments.data(), static_cast<int64_t>(segments.size())});
    REQUIRE(dst.memory == want);
  }
}
