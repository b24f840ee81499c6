// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The decode kernels' own sources, thread by thread on the CPU, against float64. Every slot that no
// query may see is NaN, and every table entry that none needs is -1.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "grid.hpp"
#include "guarded.hpp"
#include "kernels/cuda/kernels.hpp"
#include "numbers.hpp"

namespace cuda = kvxfer::kernels::cuda;
using cuda::Element;
using kvxfer::kernels::RowStrides;
using oracle::size_of;
using shim::Guarded;

namespace {

struct Case {
  std::vector<int> lengths;
  Element q_type = Element::kFloat16, kv_type = Element::kFloat16;
  int head_dim = 64, block_size = 16, num_kv_heads = 2, group = 4, split_size = 128;
  int num_splits =
      0;  // > 0: so many of each sequence, of at least 64 tokens; split_size is not used
  int window_left = -1;
  float soft_cap = 0, v_scale = 1;
  bool sinks = false, head_major = false, fused = false, items = false;
  bool huge_queries = false;  // in channels 0, in which keys are 0
  uint64_t seed = 1;
};

struct Result {
  std::vector<double> out;  // [batch, num_q_heads, head_dim]
  std::vector<float> lse;
};

// The inputs of a case, and what attention gives in float64 with a bound on the kernel's rounding.
class World {
 public:
  explicit World(const Case& c)
      : c_(c),
        batch_(static_cast<int>(c.lengths.size())),
        heads_(c.num_kv_heads * c.group),
        columns_(blocks_of(*std::max_element(c.lengths.begin(), c.lengths.end())) + 1),
        row_(static_cast<int64_t>(size_of(c.kv_type)) * c.head_dim),
        stride_(c.fused ? 2 * row_ : row_ + 16),
        num_blocks_(count_blocks()),
        k_(cache_bytes()),
        v_(c.fused ? 1 : cache_bytes()),
        q_(static_cast<size_t>(batch_) * heads_ * c.head_dim),
        table_(static_cast<size_t>(batch_) * columns_),
        lens_(std::vector<int32_t>(c.lengths.begin(), c.lengths.end())),
        sinks_(heads_) {
    std::mt19937 random(static_cast<uint32_t>(c.seed));
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < q_.size(); ++i) {
      const bool huge = c.huge_queries && i % static_cast<size_t>(c.head_dim) == 0;
      oracle::put(&q_[i], huge ? -1e30 : 2 * normal(random), c.q_type);
    }
    for (int h = 0; h < heads_; ++h) sinks_[h] = static_cast<float>(normal(random));
    std::vector<int32_t> ids(num_blocks_);
    for (int i = 0; i < num_blocks_; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), random);
    for (int b = 0; b < batch_; ++b) {
      for (int i = 0; i < columns_; ++i) table_[b * columns_ + i] = -1;
      for (int token = first_key(b); token < c.lengths[b]; ++token) {
        int32_t& entry = table_[b * columns_ + token / c.block_size];
        if (entry < 0) {
          entry = ids.back();
          ids.pop_back();
        }
        for (int head = 0; head < c.num_kv_heads; ++head) {
          for (int i = 0; i < c.head_dim; ++i) {
            const auto at = i * static_cast<int64_t>(size_of(c.kv_type));
            const bool none = c.huge_queries && i == 0;
            oracle::put(key(b, token, head) + at, none ? 0 : normal(random), c.kv_type);
            oracle::put(value(b, token, head) + at, normal(random), c.kv_type);
          }
        }
      }
    }
  }

  int first_key(int b) const {
    return c_.window_left < 0 ? 0 : std::max(0, c_.lengths[b] - 1 - c_.window_left);
  }

  cuda::Decode params() {
    cuda::Decode p{};
    p.q = q_.data();
    p.k = k_.data();
    p.v = values();
    p.k_strides = p.v_strides = strides();
    p.block_table = table_.data();
    p.seq_lens = lens_.data();
    p.sinks = c_.sinks ? sinks_.data() : nullptr;
    p.q_batch = p.out_batch = int64_t{heads_} * c_.head_dim;
    p.q_head = p.out_head = c_.head_dim;
    p.table_row = columns_;
    p.len_step = 1;
    p.batch = batch_;
    p.num_q_heads = heads_;
    p.num_kv_heads = c_.num_kv_heads;
    p.head_dim = c_.head_dim;
    p.block_size = c_.block_size;
    p.split_size = c_.split_size;
    p.num_splits = std::max(1, (columns_ * c_.block_size + c_.split_size - 1) / c_.split_size);
    if (c_.num_splits > 0) {
      p.split_size = 0;
      p.num_splits = c_.num_splits;
      p.min_split = 64;
    }
    p.num_items = int64_t{batch_} * p.num_splits;
    p.window_left = c_.window_left;
    p.sm_scale = 1.0f / std::sqrt(static_cast<float>(c_.head_dim));
    p.v_scale = c_.v_scale;
    p.soft_cap = c_.soft_cap;
    p.q_type = c_.q_type;
    p.kv_type = c_.kv_type;
    return p;
  }

  Result run() {
    cuda::Decode p = params();
    Guarded<uint16_t> out(q_.size());
    Guarded<float> lse(static_cast<size_t>(batch_) * heads_);
    Guarded<float> partial(lse.size() * p.num_splits * c_.head_dim),
        partial_lse(lse.size() * p.num_splits);
    const size_t tiles = (c_.group + 15) / 16;
    Guarded<uint32_t> arrived(std::vector<uint32_t>(batch_ * c_.num_kv_heads * tiles, 0));
    std::vector<int32_t> listed;
    for (int b = 0; b < batch_; ++b) {  // only the splits that hold a visible key, as a plan does
      const int end = std::max(1, (c_.lengths[b] + c_.split_size - 1) / c_.split_size);
      for (int s = first_key(b) / c_.split_size; s < end; ++s) listed.insert(listed.end(), {b, s});
    }
    Guarded<int32_t> items(listed);
    if (c_.items) {
      p.items = items.data();
      p.num_items = static_cast<int64_t>(listed.size() / 2);
    }
    p.out = out.data();
    p.lse = lse.data();
    p.partial = partial.data();
    p.partial_lse = partial_lse.data();
    p.arrived = arrived.data();
    cuda::paged_decode(p, shim_a_stream());
    REQUIRE(shim_stream == shim_a_stream());
    for (size_t i = 0; i < arrived.size(); ++i) REQUIRE(arrived[i] == 0);
    Result result{{}, lse.values()};
    for (size_t i = 0; i < out.size(); ++i) result.out.push_back(oracle::get(&out[i], c_.q_type));
    return result;
  }

  void check(const Result& result) {
    const double out_eps = c_.q_type == Element::kBFloat16 ? 0x1p-8 : 0x1p-11;
    const double p_eps = c_.kv_type == Element::kBFloat16 ? 0x1p-8 : 0x1p-11;
    for (int b = 0; b < batch_; ++b) {
      for (int h = 0; h < heads_; ++h) {
        const auto d = static_cast<size_t>(c_.head_dim);
        std::vector<double> out(d), size(d);
        const double lse = attend(b, h, out, size);
        const size_t at = static_cast<size_t>(b) * heads_ + h;
        CAPTURE(b);
        CAPTURE(h);
        if (std::isinf(lse)) {
          REQUIRE(result.lse[at] == -INFINITY);
        } else {
          REQUIRE(std::fabs(result.lse[at] - lse) <= 1e-5 * (1 + std::fabs(lse)));
        }
        for (size_t i = 0; i < d; ++i) {
          // The weights are rounded once, the result once; the rest is float32.
          const double bound =
              1.05 * (out_eps * std::fabs(out[i]) + p_eps * size[i]) + 2e-5 * (1 + size[i]);
          REQUIRE(std::fabs(result.out[at * d + i] - out[i]) <= bound);
        }
      }
    }
  }

 private:
  int blocks_of(int tokens) const { return (tokens + c_.block_size - 1) / c_.block_size; }
  int count_blocks() const {
    int count = 2;
    for (const int n : c_.lengths) count += blocks_of(n);
    return count;
  }
  RowStrides strides() const {
    const int64_t block = stride_ * c_.block_size * c_.num_kv_heads;
    return c_.head_major ? RowStrides{block, stride_, stride_ * c_.block_size}
                         : RowStrides{block, stride_ * c_.num_kv_heads, stride_};
  }
  size_t cache_bytes() const { return static_cast<size_t>(strides().block * num_blocks_); }
  char* values() { return c_.fused ? k_.data() + row_ : v_.data(); }
  int64_t offset(int b, int token, int head) {
    return kvxfer::kernels::row_offset(strides(), table_[b * columns_ + token / c_.block_size],
                                       token % c_.block_size, head);
  }
  char* key(int b, int token, int head) { return k_.data() + offset(b, token, head); }
  char* value(int b, int token, int head) { return values() + offset(b, token, head); }

  // Softmax attention by its definition; size: the weighted mean of |v|. Returns the LSE.
  double attend(int b, int h, std::vector<double>& out, std::vector<double>& size) {
    const int head = h / c_.group;
    const auto itemsize = static_cast<int64_t>(size_of(c_.kv_type));
    std::vector<double> logits;
    for (int token = first_key(b); token < c_.lengths[b]; ++token) {
      double sum = 0;
      for (int i = 0; i < c_.head_dim; ++i) {
        sum +=
            oracle::get(&q_[(static_cast<size_t>(b) * heads_ + h) * c_.head_dim + i], c_.q_type) *
            oracle::get(key(b, token, head) + i * itemsize, c_.kv_type);
      }
      sum /= std::sqrt(static_cast<double>(c_.head_dim));
      logits.push_back(c_.soft_cap > 0 ? c_.soft_cap * std::tanh(sum / c_.soft_cap) : sum);
    }
    double highest = c_.sinks ? sinks_[h] : -INFINITY, total = 0;
    for (const double x : logits) highest = std::max(highest, x);
    if (std::isinf(highest)) return -INFINITY;
    if (c_.sinks) total += std::exp(sinks_[h] - highest);
    for (const double x : logits) total += std::exp(x - highest);
    for (size_t k = 0; k < logits.size(); ++k) {
      const double weight = std::exp(logits[k] - highest) / total * c_.v_scale;
      for (int i = 0; i < c_.head_dim; ++i) {
        const double x = oracle::get(
            value(b, first_key(b) + static_cast<int>(k), head) + i * itemsize, c_.kv_type);
        out[i] += weight * x;
        size[i] += weight * std::fabs(x);
      }
    }
    return highest + std::log(total);
  }

  Case c_;
  int batch_, heads_, columns_;
  int64_t row_, stride_;
  int num_blocks_;
  Guarded<char> k_, v_;
  Guarded<uint16_t> q_;
  Guarded<int32_t> table_, lens_;
  Guarded<float> sinks_;
};

void check(const Case& c) {
  CAPTURE(c.head_dim);
  CAPTURE(c.block_size);
  CAPTURE(c.group);
  CAPTURE(static_cast<int>(c.kv_type));
  for (int seed = 0; seed < oracle::num_seeds(); ++seed) {
    shim::set_seed(c.seed * 1000 + seed);
    World world(c);
    world.check(world.run());
  }
}

constexpr std::pair<Element, Element> kTypes[] = {{Element::kFloat16, Element::kFloat16},
                                                  {Element::kBFloat16, Element::kBFloat16},
                                                  {Element::kFloat16, Element::kE4m3},
                                                  {Element::kBFloat16, Element::kE4m3}};

}  // namespace

TEST_CASE("decode: every dtype, head_dim and block size, at lengths around a block and a split") {
  uint64_t seed = 0;
  for (const auto& [q_type, kv_type] : kTypes) {
    for (const int head_dim : {64, 128, 256}) {
      for (const int block_size : {16, 7}) {
        Case c;
        c.q_type = q_type;
        c.kv_type = kv_type;
        c.head_dim = head_dim;
        c.block_size = block_size;
        c.lengths = {0, 1, block_size - 1, block_size, block_size + 1, 130};
        c.num_kv_heads = head_dim == 256 ? 1 : 2;
        c.seed = ++seed;
        check(c);
      }
    }
  }
}

TEST_CASE("decode: blocks as long as a tile of keys, and longer") {
  for (const int block_size : {64, 128, 256, 528}) {
    for (const auto& [q_type, kv_type] : kTypes) {
      Case c;
      c.q_type = q_type;
      c.kv_type = kv_type;
      c.block_size = block_size;
      c.lengths = {block_size - 1, block_size + 1, 70};
      c.window_left = block_size == 128 ? 100 : -1;
      c.head_major = block_size == 256;
      c.split_size = 128;
      c.num_kv_heads = 1;
      c.seed = static_cast<uint64_t>(block_size);
      check(c);
    }
  }
}

TEST_CASE("decode: group sizes, also beyond the 16 rows of a product") {
  for (const int group : {1, 3, 4, 8, 16, 20}) {
    Case c;
    c.lengths = {37, 150};
    c.group = group;
    c.seed = static_cast<uint64_t>(group);
    check(c);
  }
}

TEST_CASE("decode: window, softcap, sinks and scales, in any mixture") {
  std::mt19937 random(5);
  for (int round = 0; round < 24; ++round) {
    Case c;
    std::tie(c.q_type, c.kv_type) = kTypes[random() % 4];
    c.head_dim = std::vector<int>{64, 64, 128, 256}[random() % 4];
    c.block_size = std::vector<int>{1, 5, 16, 32, 48}[random() % 5];
    for (int b = 0; b < 3; ++b) c.lengths.push_back(static_cast<int>(random() % 400));
    c.window_left = std::vector<int>{-1, 0, 1, 63, 64, 100}[random() % 6];
    c.soft_cap = random() % 2 ? 3.0f : 0.0f;
    c.v_scale = random() % 2 ? 0.5f : 1.0f;
    c.sinks = random() % 2;
    c.head_major = random() % 2;
    c.fused = random() % 2;
    c.items = random() % 2;
    c.split_size = std::vector<int>{64, 128, 512}[random() % 3];
    c.num_kv_heads = 1 + static_cast<int>(random() % 2);
    c.seed = random() % 1000;
    check(c);
  }
}

TEST_CASE("decode: a split so long that each stage of the pipeline is filled again") {
  uint64_t seed = 0;
  for (const auto& [q_type, kv_type] : kTypes) {
    for (const int head_dim : {64, 128, 256}) {
      Case c;
      c.q_type = q_type;
      c.kv_type = kv_type;
      c.head_dim = head_dim;
      c.lengths = {650};  // of at most 128 tokens a tile, in at most 4 stages
      c.split_size = 704;
      c.num_kv_heads = 1;
      c.seed = ++seed;
      check(c);
    }
  }
}

TEST_CASE("decode: bfloat16 queries beyond float16's largest over an fp8 cache are clamped to it") {
  for (const int head_dim : {64, 128, 256}) {
    Case c;
    c.q_type = Element::kBFloat16;
    c.kv_type = Element::kE4m3;
    c.head_dim = head_dim;
    c.lengths = {20};
    c.huge_queries = true;  // as infinities they would be NaN times 0
    check(c);
  }
}

TEST_CASE("decode: many splits, summed in their order whatever the order of the blocks") {
  Case c;
  c.lengths = {900, 64, 129};
  c.split_size = 64;
  c.num_kv_heads = 1;
  World world(c);
  shim::set_seed(1);
  const Result first = world.run();
  world.check(first);
  for (uint64_t seed = 2; seed < 5; ++seed) {
    shim::set_seed(seed);
    const Result again = world.run();
    CHECK(again.out == first.out);
    CHECK(again.lse == first.lse);
  }
}

TEST_CASE("decode: splits of a size that follows from the sequence's own length") {
  for (const int num_splits : {1, 3, 7}) {
    for (const int window : {-1, 100}) {
      Case c;
      c.lengths = {0, 1, 64, 65, 192, 193, 449, 900};
      c.num_splits = num_splits;
      c.window_left = window;
      check(c);
    }
  }
}

TEST_CASE("decode: a cache beyond 2^33 bytes is read where it is") {
  const int64_t heads = 1, dim = 64, block_size = 16, row = dim * 2;
  const RowStrides strides{block_size * heads * row, heads * row, row};
  const int64_t blocks = (int64_t{20} << 30) / strides.block;
  Guarded<char> cache(static_cast<size_t>(blocks * strides.block));
  const auto last = static_cast<int32_t>(blocks - 1);
  Guarded<uint16_t> q(std::vector<uint16_t>(dim, 0x3c00)), out(dim);
  for (int64_t i = 0; i < dim; ++i) {
    oracle::put(cache.data() + last * strides.block + i * 2, static_cast<double>(i),
                Element::kFloat16);
  }
  Guarded<int32_t> table(std::vector<int32_t>{last}), lens(std::vector<int32_t>{1});
  cuda::Decode p{};
  p.q = q.data();
  p.out = out.data();
  p.k = p.v = cache.data();
  p.k_strides = p.v_strides = strides;
  p.block_table = table.data();
  p.seq_lens = lens.data();
  p.q_batch = p.q_head = p.out_batch = p.out_head = dim;
  p.table_row = p.len_step = 1;
  p.num_items = 1;
  p.batch = p.num_q_heads = p.num_kv_heads = p.num_splits = 1;
  p.head_dim = dim;
  p.block_size = block_size;
  p.split_size = 64;
  p.window_left = -1;
  p.sm_scale = p.v_scale = 1;
  p.q_type = p.kv_type = Element::kFloat16;
  cuda::paged_decode(p, nullptr);
  for (int64_t i = 0; i < dim; ++i)
    CHECK(oracle::get(&out[i], Element::kFloat16) == static_cast<double>(i));
}

TEST_CASE("decode: what the kernels cannot run is refused with the reason") {
  Case c;
  c.lengths = {5};
  World world(c);
  cuda::Decode p = world.params();
  CHECK(cuda::decode_refuses(p) == nullptr);
  p.head_dim = 96;
  CHECK(std::string(cuda::decode_refuses(p)).find("64, 128 or 256") != std::string::npos);
  p = world.params();
  p.kv_type = Element::kBFloat16;
  CHECK(std::string(cuda::decode_refuses(p)).find("dtype") != std::string::npos);
  p = world.params();
  p.k_strides.token += 8;
  CHECK(std::string(cuda::decode_refuses(p)).find("16 bytes") != std::string::npos);
  p = world.params();
  p.split_size = 100;
  CHECK_THROWS(cuda::paged_decode(p, nullptr));
  p.split_size = 0;
  p.min_split = 100;
  CHECK_THROWS(cuda::paged_decode(p, nullptr));
  p.min_split = 64;
  p.num_splits = 0;
  CHECK_THROWS(cuda::paged_decode(p, nullptr));
}
