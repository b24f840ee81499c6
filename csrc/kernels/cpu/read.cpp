// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The bound of whatever reads a paged cache: nothing but reading it.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

constexpr int64_t kLine = 64, kBytesPerItem = 1 << 20;

// Sums the words of one block, while the lines of the next are asked for.
uint64_t sum_block(const char* block, const char* next, int64_t nbytes) {
  uint64_t sums[kLine / 8] = {};
  int64_t at = 0;
  for (; at + kLine <= nbytes; at += kLine) {
    __builtin_prefetch(next + at, 0, 2);
    uint64_t words[kLine / 8];
    std::memcpy(words, block + at, kLine);
    for (size_t i = 0; i < std::size(sums); ++i) sums[i] += words[i];
  }
  uint64_t sum = 0;
  for (; at < nbytes; ++at) sum += static_cast<unsigned char>(block[at]);
  for (const uint64_t each : sums) sum += each;
  return sum;
}

}  // namespace

uint64_t read_blocks(const char* const* blocks, int64_t count, int64_t nbytes) {
  std::atomic<uint64_t> total{0};  // relaxed: read once the threads are done
  const int64_t per_item = std::max<int64_t>(1, kBytesPerItem / std::max<int64_t>(1, nbytes));
  parallel_for(ceil_div(count, per_item), 0, true, [&](int64_t item, void*) {
    uint64_t sum = 0;
    const int64_t end = std::min(count, (item + 1) * per_item);
    for (int64_t i = item * per_item; i < end; ++i) {
      sum += sum_block(blocks[i], blocks[std::min(i + 1, count - 1)], nbytes);
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load(std::memory_order_relaxed);
}

}  // namespace kvxfer::kernels::cpu
