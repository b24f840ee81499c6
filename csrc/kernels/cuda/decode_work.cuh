// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What paged_decode's thread blocks are: their shape by dtype and head_dim, what each works on, and
// how a finished sum is written.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * 32;
inline constexpr int kDecodeRows = 16;  // query heads per block; tokens of a group
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
// Stands for -inf in running maxima, as exp2(-inf - -inf) would be NaN.
inline constexpr float kLowest = -1e30f;

// How a cache's element is multiplied: fp8 as fp16, one conversion instruction for two values.
template <class KV>
struct MmaOf {
  using Type = KV;
};
template <>
struct MmaOf<E4m3> {
  using Type = __half;
};

template <class KV, int kDim>
struct DecodeShape {
  static constexpr bool kFp8 = sizeof(KV) == 1;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(KV));
  static constexpr int kChunks = kRowBytes / 16;
  // Groups of 16 tokens that a warp has of a tile. Where rows are short, one group's chain of
  // products, maximum and exponentials would leave the warp waiting for single results: two.
  static constexpr int kGroups = kRowBytes <= 128 ? 2 : 1;
  static constexpr int kTokens = kGroups * kDecodeRows;  // of a tile, per warp
  static constexpr int kTile = kDecodeWarps * kTokens;   // tokens
  // More thread blocks on a processor beat more stages.
  static constexpr int kStages = kRowBytes == 512 ? 2 : kRowBytes == 64 ? 4 : 3;
  static constexpr int kTileBytes = kTile * kRowBytes;  // of K, and of V
  // 256 channels of queries and of sums are too many registers: the queries, which all warps share,
  // then lie behind the tiles, fragment by fragment.
  static constexpr bool kQueriesInShared = kDim == 256;
  static constexpr int kTilesBytes = kStages * 2 * kTileBytes;
  static constexpr int kSharedBytes = kTilesBytes + (kQueriesInShared ? kDim / 16 * 32 * 16 : 0);
  // Blocks that the shared memory of Hopper's processors holds: registers shall not make them
  // fewer, nor be saved, by spilling, for more.
  static constexpr int kMinBlocks = (224 << 10) / kSharedBytes;
  // The warps' results reuse it at the end.
  static_assert(kDecodeWarps * kDecodeRows * (kDim + 2) * 4 + 4 <= kTilesBytes, "");

  // Where a row's 16-byte chunk lies: 8 rows of one chunk (ldmatrix) and 2 rows of 4 chunks (wide
  // loads of fp8) are in different banks.
  __device__ static int place(int row, int chunk) {
    if constexpr (kChunks == 4) {
      return row * kRowBytes + (chunk ^ (row >> 1 & 3)) * 16;
    } else {
      const int reversed = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
      return row * kRowBytes + (chunk ^ reversed) * 16;
    }
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(&bits, &both, 4);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &both, 4);
  }
  return bits;
}

// Exact to float32's rounding of 1; large arguments give 1 and -1 by way of infinity and 0.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return 1.0f - __fdividef(2.0f, exp2_fast(2.0f * kLog2e * x) + 1.0f);
}

// What a thread block works on.
struct DecodeWork {
  int sequence, kv_head, group_tile, split;
  int first_split, last_split;  // of the sequence: those that hold a visible key
  int begin, end;               // keys of this split
  int first_head, num_rows;     // query heads
};

__device__ inline DecodeWork decode_work(const Decode& p) {
  DecodeWork w;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int group_tiles = (group + kDecodeRows - 1) / kDecodeRows;
  const int head_tiles = p.num_kv_heads * group_tiles;
  const int64_t item = blockIdx.x / head_tiles;
  const int head_tile = static_cast<int>(blockIdx.x % head_tiles);
  w.kv_head = head_tile / group_tiles;
  w.group_tile = head_tile % group_tiles;
  // The first splits of all sequences come first: those that long sequences alone have, last.
  w.sequence = p.items ? p.items[item * 2] : static_cast<int>(item % p.batch);
  w.split = p.items ? p.items[item * 2 + 1] : static_cast<int>(item / p.batch);
  const int length = p.seq_lens[w.sequence * p.len_step];
  const int visible = length > 0 ? static_cast<int>(window_begin(length - 1, p.window_left)) : 0;
  int size = p.split_size;
  if (size == 0) {
    const int even = (length + p.num_splits - 1) / p.num_splits;
    size = max(p.min_split, (even + kDecodeTile - 1) / kDecodeTile * kDecodeTile);
  }
  w.first_split = visible / size;
  w.last_split = (length + size - 1) / size;
  w.begin = max(visible, w.split * size);
  w.end = min(length, w.split * size + size);
  w.first_head = w.kv_head * group + w.group_tile * kDecodeRows;
  w.num_rows = min(kDecodeRows, group - w.group_tile * kDecodeRows);
  return w;
}

// Adds the sink to a sum over keys (maximum, total, value; base 2) and writes the result.
__device__ inline void finish_element(const Decode& p, const DecodeWork& w, int row, int channel,
                                      float highest, float total, float value) {
  const int head = w.first_head + row;
  if (p.sinks) {
    const float sink = p.sinks[head] * kLog2e;
    const float raised = fmaxf(highest, sink), fade = exp2_fast(highest - raised);
    total = total * fade + exp2_fast(sink - raised);
    value *= fade;
    highest = raised;
  }
  const float result = total > 0 ? value / total * p.v_scale : 0.0f;
  const int64_t at = w.sequence * p.out_batch + head * p.out_head + channel;
  if (p.q_type == Element::kBFloat16) {
    static_cast<__nv_bfloat16*>(p.out)[at] = narrow<__nv_bfloat16>(result);
  } else {
    static_cast<__half*>(p.out)[at] = narrow<__half>(result);
  }
  if (p.lse && channel == 0) {
    p.lse[int64_t{w.sequence} * p.num_q_heads + head] =
        total > 0 ? (highest + log2f(total)) * kLn2 : -INFINITY;
  }
}

}  // namespace kvxfer::kernels::cuda
