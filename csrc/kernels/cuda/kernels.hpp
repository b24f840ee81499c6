// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' launchers. All pointers are device pointers; nothing here synchronises. Shapes
// and dtypes are the caller's promise, and so are slots and block ids: they live on the device,
// where a look at them would cost a synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/index_math.hpp"

namespace kvxfer::kernels::cuda {

enum class Element : uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kE4m3 = 3 };

inline constexpr int64_t itemsize(Element element) {
  return element == Element::kFloat32 ? 4 : element == Element::kE4m3 ? 1 : 2;
}

// Keys or values: rows in, cache out. Strides in bytes.
struct AppendPart {
  const void* rows;     // [num_tokens, num_kv_heads, width]
  void* cache;          // [num_blocks, block_size, num_kv_heads, width]
  RowStrides from, to;  // from.block is not used
  int32_t width;        // elements
  float scale;          // stored = value / scale
};

struct Append {
  AppendPart part[2];
  const int64_t* slots;  // [num_tokens], -1 skips
  int64_t num_tokens, block_size;
  int32_t num_kv_heads;
  Element from, to;  // from is no fp8
};

struct CopyPart {
  RowStrides src, dst;  // bytes
  int32_t width;        // elements of 1 byte where bytes are copied, else of the dtypes
};

inline constexpr int kMaxParts = 8;

inline constexpr int kInlineTables = 3456;  // bytes: all parameters of a launch may have 4096

// Tables in device memory; where bases is null they lie in `tables`, one behind the other: small
// ones travel with the launch, since an upload of their own takes as long as some copies.
struct Copy {
  CopyPart part[kMaxParts];
  const int64_t* bases;     // [num_parts, num_layers, 2]: addresses of source and destination
  const int64_t* segments;  // [num_segments, 5]: src block, slot, dst block, slot, tokens
  const float* scales;      // [num_parts, num_layers, num_heads, 2]: of source, destination
  int32_t num_parts, num_layers, num_heads;
  int64_t num_segments;
  int32_t access;    // bytes per access, 16 or a smaller power of two that divides every address
  int32_t max_ctas;  // 0: as many as help
  bool convert;      // dst = narrow(widen(src) * source scale / destination scale)
  bool scaled;       // else both scales are 1, and there are no scales
  Element from, to;
  alignas(16) unsigned char tables[kInlineTables];
};

// One query per sequence. Strides of caches in bytes, of the rest in elements; every row of K, V
// and q begins at a multiple of 16 bytes.
struct Decode {
  const void* q;  // [batch, num_q_heads, head_dim], fp16 or bf16
  void* out;      // as q
  float* lse;     // [batch, num_q_heads] or null, natural logarithm
  const void *k, *v;
  RowStrides k_strides, v_strides;
  const int32_t* block_table;  // [batch, max_blocks]
  const int32_t* seq_lens;     // [batch]
  const float* sinks;          // [num_q_heads] or null
  const int32_t* items;        // [num_items, 2]: sequence, split; null: all of num_splits x batch
  float* partial;      // [batch, num_q_heads, num_splits, head_dim]; unused where num_splits is 1
  float* partial_lse;  // [batch, num_q_heads, num_splits], base 2
  uint32_t* arrived;   // [batch, num_kv_heads, tiles of 16 of the group]: 0, and left 0
  int64_t q_batch, q_head, out_batch, out_head, table_row, len_step;
  int64_t num_items;
  int32_t batch, num_q_heads, num_kv_heads, head_dim, block_size;
  // Tokens of a split, a multiple of kDecodeTile. 0: each sequence's own, as many as make
  // num_splits splits of it, but at least min_split.
  int32_t num_splits, split_size, min_split;
  Divisor by_block_size;
  int32_t window_left;                // -1: none
  float sm_scale, v_scale, soft_cap;  // soft_cap 0: none; the scale of K is part of sm_scale
  Element q_type, kv_type;            // equal, or kv_type e4m3
};

inline constexpr int32_t kDecodeTile = 64;  // a split's tokens are a multiple of it

struct Merge {
  const void *v_a, *v_b;  // [num_rows, num_heads, width]; strides in elements, channels adjacent
  const float *lse_a, *lse_b;  // [num_rows, num_heads], natural logarithm
  void* out;                   // [num_rows, num_heads, width], dense
  float* lse;                  // [num_rows, num_heads], dense
  int64_t a_row, a_head, b_row, b_head, lse_a_row, lse_a_head, lse_b_row, lse_b_head;
  int64_t num_rows;
  int32_t num_heads, width;
  Element type;  // no fp8
};

struct ChecksumPart {
  RowStrides strides;  // bytes
  int32_t row_nbytes;
  int32_t id;  // of the part, as in hash_row
};

struct Checksum {
  ChecksumPart part[kMaxParts];
  const int64_t* bases;     // [num_parts, num_layers]: addresses
  const int64_t* layers;    // [num_layers]: the model's numbers
  const int64_t* segments;  // [num_segments, 4]: block, slot, tokens, token of the sequence
  uint64_t* sums;           // [num_layers], 0 before the launch
  int32_t num_parts, num_layers, first_head, num_heads;
  int64_t num_segments;
};

// Why these kernels cannot run this call; null where they can.
const char* decode_refuses(const Decode& params);

void paged_decode(const Decode& params, cudaStream_t stream);
// How many thread blocks of this call's kernel the current device holds at once.
int64_t decode_slots(const Decode& params);
void merge_states(const Merge& params, cudaStream_t stream);
void checksum_blocks(const Checksum& params, cudaStream_t stream);
void append_kv(const Append& params, cudaStream_t stream);
void copy_rows(const Copy& params, cudaStream_t stream);
// Where a copy's tables are when they lie in a row from `at` on; its counts are set.
void place_tables(Copy& params, const void* at);
int device_count();  // 0 also where there is no driver
// Lets `device`, which is the current one, read and write memory that cudaMalloc gave on `peer`.
// Throws kUnavailable where nothing joins the two.
void reach_peer(int device, int peer);
uint64_t capture_id(
    cudaStream_t stream);  // of the graph that the stream is being captured into, or 0

}  // namespace kvxfer::kernels::cuda
