// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Checksums of what blocks hold: sums of row hashes, so the order in which threads meet the rows
// does not matter.
#include "kernels/checksum.hpp"

#include <algorithm>
#include <vector>

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

constexpr int64_t kBytesPerItem = 1 << 18;
constexpr int64_t kWorthWaking = 1 << 18;

uint64_t sum_tokens(const Checksum& p, int64_t layer, int64_t begin, int64_t end) {
  const IsaTable& table = isa();
  const char* base = reinterpret_cast<const char*>(p.bases[layer]);
  uint64_t sum = 0;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = p.block_ids[token / p.block_size];
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const char* row = base + row_offset(p.strides, block, token % p.block_size, head);
      sum += hash_row(table.sum_pairs(row, p.row_bytes, p.keys), static_cast<uint64_t>(p.part_id),
                      static_cast<uint64_t>(p.layers[layer]),
                      static_cast<uint64_t>(p.first_head + head), static_cast<uint64_t>(token));
    }
  }
  return sum;
}

}  // namespace

void checksum_rows(const Checksum& p) {
  for (int64_t i = p.first_token / p.block_size; i < ceil_div(p.end_token, p.block_size); ++i) {
    if (p.block_ids[i] < 0 || p.block_ids[i] >= p.num_blocks) {
      fail(Code::kInvalidArgument, "block_ids[", i, "]: expected a block id from 0 to ",
           p.num_blocks - 1, ", given ", p.block_ids[i]);
    }
  }
  const int64_t tokens = p.end_token - p.first_token;
  const int64_t token_bytes = p.num_heads * p.row_bytes;
  if (tokens <= 0 || token_bytes == 0) return;
  const int64_t per_item = std::max<int64_t>(1, kBytesPerItem / token_bytes);
  const int64_t items = ceil_div(tokens, per_item);
  std::vector<uint64_t> partial(static_cast<size_t>(p.num_layers * items));
  const bool worth_waking = tokens * token_bytes * p.num_layers > kWorthWaking;
  parallel_for(p.num_layers * items, 0, worth_waking, [&](int64_t i, void*) {
    const int64_t begin = p.first_token + i % items * per_item;
    partial[static_cast<size_t>(i)] =
        sum_tokens(p, i / items, begin, std::min(p.end_token, begin + per_item));
  });
  for (size_t i = 0; i < partial.size(); ++i) p.sums[i / static_cast<size_t>(items)] += partial[i];
}

}  // namespace kvxfer::kernels::cpu
