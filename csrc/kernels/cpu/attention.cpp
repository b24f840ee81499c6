// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Divides attention calls into items of fixed size, whose results depend neither on the batch nor
// on the threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

// Below this many multiply-adds a call is done before a sleeping thread is awake.
constexpr int64_t kWorthWaking = 1 << 19;

int64_t rows_of(const Attention& a, int64_t sequence) {
  if (a.cu_seqlens_q == nullptr) return a.seq_lens[sequence] > 0 ? 1 : 0;
  return a.cu_seqlens_q[sequence + 1] - a.cu_seqlens_q[sequence];
}

// The first key that any row of the sequence may see.
int64_t first_key(const Attention& a, int64_t sequence) {
  return window_begin(a.seq_lens[sequence] - rows_of(a, sequence), a.window_left);
}

void check_tables(const Attention& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.seq_lens[b], rows = rows_of(a, b);
    if (length < 0)
      fail(Code::kInvalidArgument, "seq_lens[", b, "]: expected >= 0, given ", length);
    if (rows < 0 || rows > length) {
      fail(Code::kInvalidArgument, "seq_lens[", b, "]: expected at least the ", rows,
           " new tokens of that sequence, given ", length);
    }
    if (rows == 0) continue;
    const int64_t blocks = ceil_div(length, a.block_size);
    if (blocks > a.max_blocks) {
      fail(Code::kInvalidArgument, "block_table: expected at least ", blocks, " blocks of ",
           a.block_size, " for the ", length, " tokens of sequence ", b, ", given ", a.max_blocks);
    }
    const int32_t* table = a.block_table + b * a.table_stride;
    for (int64_t i = first_key(a, b) / a.block_size; i < blocks; ++i) {
      if (table[i] < 0 || table[i] >= a.num_blocks) {
        fail(Code::kInvalidArgument, "block_table[", b, ", ", i,
             "]: expected a block id from 0 to ", a.num_blocks - 1, ", given ", table[i]);
      }
    }
  }
}

void write_empty(const Attention& a, int64_t row) {
  const auto bytes = static_cast<size_t>(a.head_dim_v * itemsize(a.out.dtype));
  for (int64_t h = 0; h < a.num_q_heads; ++h) {
    char* out = static_cast<char*>(a.out.data) +
                (row * a.out.stride_row + h * a.out.stride_head) * itemsize(a.out.dtype);
    std::fill_n(out, bytes, char{0});
    if (a.lse == nullptr) continue;
    a.lse[row * a.lse_stride + h] =
        a.sinks != nullptr ? a.sinks[h] : -std::numeric_limits<float>::infinity();
  }
}

struct DecodeRow {
  int64_t row, first_item, num_splits;
};

struct Work {
  std::vector<DecodeItem> decode;
  std::vector<DecodeRow> rows;
  std::vector<PrefillItem> prefill;
  int64_t num_partials = 0;  // in units of num_q_heads results
  int64_t cost = 0;
};

int64_t split_of(const Attention& a) { return a.split_size > 0 ? a.split_size : kDefaultSplit; }

// Heads that one item walks, so that it reads memory as it lies: in a token-major cache all of
// them, since a token's are adjacent; in a head-major cache, where a block's are, as many as leave
// each thread a few items.
int64_t heads_per_item(const Attention& a) {
  const bool head_major = a.k.strides.head > a.k.strides.token;
  if (!head_major || a.num_kv_heads == 1) return a.num_kv_heads;
  const int64_t split = split_of(a);
  int64_t splits = 0, heads = a.num_kv_heads;
  for (int64_t b = 0; b < a.batch; ++b) splits += ceil_div(a.seq_lens[b], split);
  const int64_t wanted = 4 * int64_t{get_num_threads()};
  while (heads > 1 && splits * ceil_div(a.num_kv_heads, heads) < wanted) heads = (heads + 1) / 2;
  return heads;
}

void add_decode(const Attention& a, int64_t sequence, int64_t row, int64_t heads, Work& work) {
  const int64_t split = split_of(a);
  const int64_t length = a.seq_lens[sequence];
  DecodeRow decode_row{row, work.num_partials, 0};
  for (int64_t begin = window_begin(length - 1, a.window_left); begin < length;) {
    const int64_t end = std::min(length, begin / split * split + split);
    for (int64_t head = 0; head < a.num_kv_heads; head += heads) {
      work.decode.push_back(
          {sequence, row, begin, end, head, std::min(head + heads, a.num_kv_heads), nullptr});
    }
    ++decode_row.num_splits;
    ++work.num_partials;
    begin = end;
  }
  work.rows.push_back(decode_row);
  work.cost += length * a.num_q_heads * (a.head_dim + a.head_dim_v);
}

void add_prefill(const Attention& a, int64_t sequence, Work& work) {
  const int64_t rows = rows_of(a, sequence) * (a.num_q_heads / a.num_kv_heads);
  for (int64_t begin = 0; begin < rows; begin += kTileRows) {
    for (int64_t head = 0; head < a.num_kv_heads; ++head) {
      work.prefill.push_back({sequence, head, begin, std::min(rows, begin + kTileRows)});
    }
  }
  work.cost += a.seq_lens[sequence] * rows * a.num_kv_heads * (a.head_dim + a.head_dim_v) / 2;
}

void run(const Attention& a, Work& work) {
  const IsaTable& table = isa();
  const int64_t stride = partial_stride(a.head_dim_v), group = a.num_q_heads / a.num_kv_heads;
  float* partials = nullptr;
  if (!work.decode.empty()) {
    partials = static_cast<float*>(caller_buffer(work.num_partials * a.num_q_heads * stride * 4));
    int64_t index = -1, last_begin = -1, last_sequence = -1;
    for (DecodeItem& item : work.decode) {
      if (item.sequence != last_sequence || item.key_begin != last_begin) ++index;
      last_sequence = item.sequence, last_begin = item.key_begin;
      item.partial = partials + (index * a.num_q_heads + item.head_begin * group) * stride;
    }
  }
  // Longest first, so that no thread starts a long item when the others are done.
  std::stable_sort(work.prefill.begin(), work.prefill.end(), [&](const auto& x, const auto& y) {
    const auto keys = [&](const PrefillItem& i) {
      const int64_t end = a.seq_lens[i.sequence];
      return a.causal ? end - rows_of(a, i.sequence) + i.row_end / group : end;
    };
    return keys(x) > keys(y);
  });
  const auto num_prefill = static_cast<int64_t>(work.prefill.size());
  const auto num_items = num_prefill + static_cast<int64_t>(work.decode.size());
  const int64_t scratch = std::max(work.decode.empty() ? 0 : table.decode_scratch(a),
                                   work.prefill.empty() ? 0 : table.prefill_scratch(a));
  const bool worth_waking = work.cost > kWorthWaking;
  parallel_for(num_items, scratch, worth_waking, [&](int64_t i, void* memory) {
    if (i < num_prefill) return table.prefill(a, work.prefill[static_cast<size_t>(i)], memory);
    table.decode(a, work.decode[static_cast<size_t>(i - num_prefill)], memory);
  });
  const bool many = work.num_partials * a.num_q_heads * stride > kWorthWaking;
  parallel_for(
      static_cast<int64_t>(work.rows.size()), a.head_dim_v * 4, many, [&](int64_t i, void* memory) {
        const DecodeRow& row = work.rows[static_cast<size_t>(i)];
        for (int64_t h = 0; h < a.num_q_heads; ++h) {
          table.finish(a, row.row, h, partials + (row.first_item * a.num_q_heads + h) * stride,
                       row.num_splits, a.num_q_heads * stride, memory);
        }
      });
}

}  // namespace

void paged_decode(const Attention& a) {
  check_tables(a);
  Work work;
  const int64_t heads = heads_per_item(a);
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.seq_lens[b] == 0) {
      write_empty(a, b);
    } else {
      add_decode(a, b, b, heads, work);
    }
  }
  run(a, work);
}

void paged_prefill(const Attention& a) {
  check_tables(a);
  Work work;
  const int64_t heads = heads_per_item(a);
  for (int64_t b = 0; b < a.batch; ++b) {
    // One new row is a decode step in a mixed batch: a tile of one row would waste 95 of 96 lanes.
    if (rows_of(a, b) == 1) {
      add_decode(a, b, a.cu_seqlens_q[b], heads, work);
    } else {
      add_prefill(a, b, work);
    }
  }
  run(a, work);
}

void merge_states(const Merge& params) {
  const IsaTable& table = isa();
  parallel_for(params.num_rows, 0,
               params.num_rows * params.num_heads * params.head_dim > kWorthWaking,
               [&](int64_t row, void*) { table.merge(params, row); });
}

}  // namespace kvxfer::kernels::cpu
