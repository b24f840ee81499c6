// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels take: plain pointers, extents and strides. Strides are in elements, int64.
#pragma once

#include <cstdint>

#include "kernels/dtype.hpp"
#include "kernels/index_math.hpp"

namespace kvxfer::kernels::cpu {

struct Rows {  // [rows, heads, channels], channels adjacent
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_row = 0, stride_head = 0;
};

struct Cache {  // [num_blocks, block_size, num_kv_heads, channels], channels adjacent
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  RowStrides strides{};
};

struct Scales {  // [num_blocks, block_size, num_kv_heads]: value = stored * scale; null: none
  float* data = nullptr;
  RowStrides strides{};
};

struct Attention {
  Rows q;                // [rows, num_q_heads, head_dim]
  Rows out;              // [rows, num_q_heads, head_dim_v], dtype of q
  float* lse = nullptr;  // [rows, num_q_heads] or null
  int64_t lse_stride = 0;
  Cache k, v;  // of one dtype
  Scales k_scales, v_scales;
  const int32_t* block_table = nullptr;  // [batch, max_blocks]
  int64_t table_stride = 0, max_blocks = 0;
  const int32_t* seq_lens = nullptr;      // [batch]
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]; null: one row per sequence (decode)
  const float* sinks = nullptr;           // [num_q_heads] or null
  int64_t batch = 0, num_q_heads = 0, num_kv_heads = 0;
  int64_t head_dim = 0, head_dim_v = 0, num_blocks = 0, block_size = 0;
  float sm_scale = 1, v_scale = 1, logits_soft_cap = 0;
  int64_t window_left = -1;
  bool causal = true;
  int64_t split_size = 0;  // decode: tokens per partial sum; 0: kDefaultSplit
};

// Fixed, so that a sequence's result depends neither on the batch nor on the number of threads.
inline constexpr int64_t kDefaultSplit = 512;

struct Append {
  Rows key, value;  // [num_tokens, num_kv_heads, head_dim(_v)], of one dtype
  Cache k, v;
  Scales k_scales, v_scales;       // written: each row's largest magnitude fills the dtype's range
  const int64_t* slots = nullptr;  // [num_tokens], -1 skips
  int64_t num_tokens = 0, num_kv_heads = 0, head_dim = 0, head_dim_v = 0;
  int64_t num_blocks = 0, block_size = 0;
  float k_scale = 1, v_scale = 1;
};

struct Merge {
  Rows a, b, out;                                  // [rows, heads, channels], of one dtype
  const float *lse_a = nullptr, *lse_b = nullptr;  // [rows, heads]
  int64_t lse_a_stride = 0, lse_b_stride = 0;
  float* lse = nullptr;  // [rows, heads], dense
  int64_t num_rows = 0, num_heads = 0, head_dim = 0;
};

struct Segment {  // tokens that lie in one block of the source and one of the destination
  int64_t src_block, src_slot, dst_block, dst_slot, tokens;
};

// Where one layer's part begins, on both sides: of a piece of memory, and there.
struct CopyBase {
  int64_t src_piece, src_offset, dst_piece, dst_offset;
};

// One part of a block copy; here all strides are in bytes.
struct CopyPart {
  const CopyBase* bases = nullptr;   // [num_layers]
  int64_t width = 0, row_bytes = 0;  // row_bytes: of the source
  RowStrides src{}, dst{};
  bool convert = false;  // then both dtypes are as below; else bytes are copied
  // [num_layers, num_heads, 2] or null, when converting: written = read * first / second.
  const float* factors = nullptr;
  DType src_dtype = DType::kFloat32, dst_dtype = DType::kFloat32;
};

struct Copy {
  const CopyPart* parts = nullptr;
  int64_t num_parts = 0, num_layers = 0, num_heads = 0;
  const uintptr_t *src_pieces = nullptr, *dst_pieces = nullptr;  // addresses
  const Segment* segments = nullptr;  // of blocks that both caches have: see cut_segments
  int64_t num_segments = 0;
};

// One part of a checksum; strides in bytes.
struct Checksum {
  const int64_t* bases = nullptr;      // [num_layers]: addresses
  const int64_t* layers = nullptr;     // [num_layers]: global ids
  uint64_t* sums = nullptr;            // [num_layers], added to
  const int64_t* block_ids = nullptr;  // of the sequence, from its token 0
  const uint32_t* keys = nullptr;      // one per 4 bytes of a row, rounded up to pairs
  int64_t num_layers = 0, part_id = 0, row_bytes = 0;
  RowStrides strides{};
  int64_t num_blocks = 0, block_size = 0;
  int64_t first_token = 0, end_token = 0;
  int64_t first_head = 0, num_heads = 0;  // bases point at the first head
};

// A stretch of one sequence's keys for one decode row, heads [head_begin, head_end).
struct DecodeItem {
  int64_t sequence, row;  // row of q and out
  int64_t key_begin, key_end;
  int64_t head_begin, head_end;
  float* partial;  // [num_q_heads of these heads, partial_stride]: max, sum, values
};

// kTileRows consecutive (token, head of the group) rows of one sequence and KV head.
struct PrefillItem {
  int64_t sequence, kv_head;
  int64_t row_begin, row_end;  // within [0, num_new * group)
};

inline constexpr int64_t kTileRows = 96;
inline constexpr int64_t kTileKeys = 64;

// Floats per partial result: running maximum (base 2), sum, then head_dim_v values.
inline constexpr int64_t partial_stride(int64_t head_dim_v) { return head_dim_v + 2; }

// The functions that exist once per instruction set.
struct IsaTable {
  const char* name;
  int64_t (*decode_scratch)(const Attention&);  // bytes per thread
  void (*decode)(const Attention&, const DecodeItem&, void* scratch);
  // Sums the partials of one row's head in order and writes out and lse.
  void (*finish)(const Attention&, int64_t row, int64_t q_head, const float* partials,
                 int64_t num_partials, int64_t distance, void* scratch);
  int64_t (*prefill_scratch)(const Attention&);
  void (*prefill)(const Attention&, const PrefillItem&, void* scratch);
  void (*convert)(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n,
                  float multiplier, float divisor);
  float (*largest)(const void* src, DType dtype, int64_t n);  // magnitude; a NaN counts as 0
  void (*merge)(const Merge&, int64_t row);
  void (*copy_runs)(char* dst, const char* src, const RunShape& shape);
  // Of hash_pair (kernels/checksum.hpp) over the row, filled up with zeros to whole pairs.
  uint64_t (*sum_pairs)(const void* row, int64_t nbytes, const uint32_t* keys);
};

}  // namespace kvxfer::kernels::cpu
