// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// paged_decode: a thread block takes one split of one sequence's keys for one KV head, whose group
// of query heads fills the 16 rows of a tensor-core product. Each warp loads, awaits and uses 16 of
// a tile's 64 tokens by itself, so the loop holds no block-wide barrier. The last block of a
// sequence and head to finish sums the splits in their order: bitwise repeatable.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * 32;
inline constexpr int kDecodeRows = 16;  // query heads per block; tokens per warp and tile
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
  // More thread blocks on a processor beat more stages.
  static constexpr int kStages = kDim == 256 ? (kFp8 ? 3 : 2) : kDim == 128 && !kFp8 ? 3 : 4;
  static constexpr int kTileBytes = kDecodeTile * kRowBytes;  // of K, and of V
  // 256 channels of queries and of sums are too many registers: the queries, which all warps share,
  // then lie behind the tiles, fragment by fragment.
  static constexpr bool kQueriesInShared = kDim == 256;
  static constexpr int kTilesBytes = kStages * 2 * kTileBytes;
  static constexpr int kSharedBytes = kTilesBytes + (kQueriesInShared ? kDim / 16 * 32 * 16 : 0);
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

template <class KV, int kDim, bool kWholePages>
class DecodeBlock {
 public:
  using Shape = DecodeShape<KV, kDim>;
  using T = typename MmaOf<KV>::Type;

  __device__ DecodeBlock(const Decode& p, const DecodeWork& w)
      : p_(p), w_(w), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {
    k_ = static_cast<const char*>(p.k) + w.kv_head * p.k_strides.head;
    v_ = static_cast<const char*>(p.v) + w.kv_head * p.v_strides.head;
    table_ = p.block_table + w.sequence * p.table_row;
    scale_ = p.soft_cap > 0 ? p.sm_scale / p.soft_cap : p.sm_scale * kLog2e;
    // What this lane copies of a tile: one chunk of every (32 / kChunks)th row.
    lane_row_ = lane_ / Shape::kChunks;
    lane_chunk_ = lane_ % Shape::kChunks;
  }

  __device__ void load_queries() {
    if constexpr (Shape::kQueriesInShared) {
      for (int step = warp_; step < kDim / 16; step += kDecodeWarps) {
        uint32_t a[4];
        load_fragment(step, a);
        *shared_fragment(step) = {a[0], a[1], a[2], a[3]};
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) load_fragment(step, q_[step]);
    }
  }

  // All tiles of this split; fills o_, highest_, total_.
  __device__ void attend() {
    const int first = w_.begin / kDecodeTile, last = (w_.end + kDecodeTile - 1) / kDecodeTile;
    block_ = look_up(first);
#pragma unroll
    for (int ahead = 0; ahead < Shape::kStages - 1; ++ahead) {
      if (first + ahead < last) issue(first + ahead, ahead);
      cp_async_commit();
    }
    load_queries();  // while the first tiles are under way
    int stage = 0, free_stage = Shape::kStages - 1;
    for (int tile = first; tile < last; ++tile) {
      cp_async_wait<Shape::kStages - 2>();
      // Other lanes' copies have landed too, and none still reads the stage that is filled next.
      __syncwarp();
      if (tile + Shape::kStages - 1 < last) issue(tile + Shape::kStages - 1, free_stage);
      cp_async_commit();
      const int token = first_token(tile);
      if (any_wanted(token)) use(token, tile_memory(stage));
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      free_stage = free_stage + 1 == Shape::kStages ? 0 : free_stage + 1;
    }
    cp_async_wait<0>();
  }

  // The warps' sums become the block's: written out, or kept as this split's part.
  __device__ void merge_warps() {
    float* values = reinterpret_cast<float*>(shared_memory());   // [warp, row, channel]
    float* maxima = values + kDecodeWarps * kDecodeRows * kDim;  // [warp, row]
    float* totals = maxima + kDecodeWarps * kDecodeRows;
    __syncthreads();  // the tiles are no longer needed
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_ * kDecodeRows + lane_ / 4 + half * 8;
      total_[half] += __shfl_xor_sync(~0u, total_[half], 1);
      total_[half] += __shfl_xor_sync(~0u, total_[half], 2);
      if (lane_ % 4 == 0) {
        maxima[row] = highest_[half];
        totals[row] = total_[half];
      }
      if (lane_ / 4 + half * 8 >= w_.num_rows) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) values[row * kDim + channel_of(n, i)] = o_[n][half * 2 + i];
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < w_.num_rows * kDim; at += kDecodeThreads) {
      const int row = at / kDim, channel = at % kDim;
      float highest = kLowest, total = 0, value = 0;
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        highest = fmaxf(highest, maxima[warp * kDecodeRows + row]);
      }
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const float weight = exp2_fast(maxima[warp * kDecodeRows + row] - highest);
        total += totals[warp * kDecodeRows + row] * weight;
        value += values[(warp * kDecodeRows + row) * kDim + channel] * weight;
      }
      if (w_.last_split - w_.first_split <= 1) {
        finish_element(p_, w_, row, channel, highest, total, value);
      } else {
        const int64_t place = part(row, w_.split);
        p_.partial[place * kDim + channel] = value / total;
        if (channel == 0) p_.partial_lse[place] = highest + log2f(total);
      }
    }
  }

  // True in the block that finishes last for its sequence and heads.
  __device__ bool is_last() {
    auto* flag = reinterpret_cast<int*>(shared_memory() + Shape::kTilesBytes - 4);
    __threadfence();  // this thread's part is visible before the count below is
    __syncthreads();
    if (threadIdx.x == 0) {
      const int group_tiles = (p_.num_q_heads / p_.num_kv_heads + kDecodeRows - 1) / kDecodeRows;
      uint32_t* arrived = p_.arrived +
                          (int64_t{w_.sequence} * p_.num_kv_heads + w_.kv_head) * group_tiles +
                          w_.group_tile;
      const uint32_t before = atomicAdd(arrived, 1u);
      *flag = before + 1 == static_cast<uint32_t>(w_.last_split - w_.first_split);
      if (*flag) *arrived = 0;  // nobody else comes; ready for the next launch
    }
    __syncthreads();
    __threadfence();
    return *flag != 0;
  }

  // Weights first, so that the loads of values depend on nothing and many are under way at once.
  // The order of a sequence's sums follows from its length alone.
  __device__ void merge_splits() {
    auto* maxima = reinterpret_cast<float*>(shared_memory());  // [row]
    float* totals = maxima + kDecodeRows;                      // [row]
    for (int row = warp_; row < w_.num_rows; row += kDecodeWarps) {
      const float* lse = p_.partial_lse + part(row, 0);
      float highest = kLowest, total = 0;
      for (int split = w_.first_split + lane_; split < w_.last_split; split += 32) {
        highest = fmaxf(highest, __ldcg(lse + split));
      }
      for (int mask = 16; mask > 0; mask /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
      }
      for (int split = w_.first_split + lane_; split < w_.last_split; split += 32) {
        total += exp2_fast(__ldcg(lse + split) - highest);
      }
      for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
      if (lane_ == 0) {
        maxima[row] = highest;
        totals[row] = total;
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < w_.num_rows * (kDim / 4); at += kDecodeThreads) {
      const int row = at / (kDim / 4), channel = at % (kDim / 4) * 4;
      const float* lse = p_.partial_lse + part(row, 0);
      const float* values = p_.partial + part(row, 0) * kDim + channel;
      float4 sum = {0, 0, 0, 0};
#pragma unroll 8
      for (int split = w_.first_split; split < w_.last_split; ++split) {
        const float weight = exp2_fast(__ldcg(lse + split) - maxima[row]);
        const float4 value =
            __ldcg(reinterpret_cast<const float4*>(values + int64_t{split} * kDim));
        sum.x += value.x * weight;
        sum.y += value.y * weight;
        sum.z += value.z * weight;
        sum.w += value.w * weight;
      }
      const float all[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        finish_element(p_, w_, row, channel + i, maxima[row], totals[row], all[i]);
      }
    }
  }

 private:
  __device__ void load_fragment(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const int row = lane_ / 4 + (reg & 1) * 8;
      // K's channels in fp8 come as 16 adjacent bytes per lane; queries follow that order.
      const int channel = Shape::kFp8 ? step / 4 * 64 + lane_ % 4 * 16 + step % 4 * 4 + (reg & 2)
                                      : step * 16 + lane_ % 4 * 2 + (reg & 2) * 4;
      a[reg] = row < w_.num_rows ? query_pair(w_.first_head + row, channel) : 0;
    }
  }

  __device__ uint4* shared_fragment(int step) const {
    return reinterpret_cast<uint4*>(shared_memory() + Shape::kTilesBytes) + step * 32 + lane_;
  }

  // s += the queries' channels of this step times K's.
  __device__ void multiply(float (&s)[4], int step, uint32_t b0, uint32_t b1) const {
    if constexpr (Shape::kQueriesInShared) {
      const uint4 f = *shared_fragment(step);
      const uint32_t a[4] = {f.x, f.y, f.z, f.w};
      mma_m16n8k16<T>(s, a, b0, b1);
    } else {
      mma_m16n8k16<T>(s, q_[step], b0, b1);
    }
  }

  __device__ uint32_t query_pair(int head, int channel) const {
    const int64_t at = w_.sequence * p_.q_batch + head * p_.q_head + channel;
    const uint32_t bits =
        *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p_.q) + at);
    if constexpr (!Shape::kFp8) return bits;
    if (p_.q_type != Element::kBFloat16) return bits;
    const float low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xffff0000u);
    return pack2<T>(fminf(fmaxf(low, -65504.0f), 65504.0f),
                    fminf(fmaxf(high, -65504.0f), 65504.0f));
  }

  // The first of the 16 tokens that this warp has of a tile.
  __device__ int first_token(int tile) const { return tile * kDecodeTile + warp_ * kDecodeRows; }
  __device__ bool wanted(int token) const { return token >= w_.begin && token < w_.end; }

  // This warp's rows of a stage: K, and V at kTileBytes behind.
  __device__ char* tile_memory(int stage) const {
    return shared_memory() + stage * 2 * Shape::kTileBytes + warp_ * kDecodeRows * Shape::kRowBytes;
  }

  __device__ bool any_wanted(int token) const {  // of 16
    return token < w_.end && token + kDecodeRows > w_.begin;
  }
  __device__ bool all_wanted(int token) const {
    return token >= w_.begin && token + kDecodeRows <= w_.end;
  }

  // The block id of this warp's page, or of the row that this lane looks after. Entries that hold
  // no wanted token are not looked at: they may be -1, or beyond the table.
  __device__ int look_up(int tile) const {
    const int token = first_token(tile) + (kWholePages ? 0 : lane_ % kDecodeRows);
    const bool useful = kWholePages ? any_wanted(token) : wanted(token);
    return useful ? table_[p_.by_block_size.quotient(token)] : 0;
  }

  // Starts the copies of a tile, whose ids block_ holds, and looks up the ids of the next one.
  __device__ void issue(int tile, int stage) {
    const int token = first_token(tile);
    if (kWholePages && all_wanted(token)) {
      copy_rows<true>(token, tile_memory(stage));
    } else if (!kWholePages || any_wanted(token)) {  // shuffles want no branch around them
      copy_rows<false>(token, tile_memory(stage));
    }
    block_ = look_up(tile + 1);
  }

  template <bool kAll>
  __device__ void copy_rows(int token, char* to) const {
    const int mine = token + (kWholePages ? 0 : lane_ % kDecodeRows);
    const int64_t slot = mine - p_.by_block_size.quotient(mine) * p_.block_size;
    const int64_t k_offset = block_ * p_.k_strides.block + slot * p_.k_strides.token;
    const int64_t v_offset = block_ * p_.v_strides.block + slot * p_.v_strides.token;
    constexpr int kRowStep = 32 / Shape::kChunks;
    const char* k = k_ + lane_chunk_ * 16;
    const char* v = v_ + lane_chunk_ * 16;
    if constexpr (kWholePages) {
      k += k_offset + lane_row_ * p_.k_strides.token;
      v += v_offset + lane_row_ * p_.v_strides.token;
    }
#pragma unroll
    for (int i = 0; i < Shape::kChunks / 2; ++i) {
      const int row = i * kRowStep + lane_row_;
      const char* k_row = kWholePages ? k + i * (kRowStep * p_.k_strides.token)
                                      : k + __shfl_sync(~0u, k_offset, row);
      const char* v_row = kWholePages ? v + i * (kRowStep * p_.v_strides.token)
                                      : v + __shfl_sync(~0u, v_offset, row);
      // Rows that nobody wants become zeros: what memory holds there may be NaN, and 0 * NaN is.
      const bool take = kAll || wanted(token + row);
      char* place = to + Shape::place(row, lane_chunk_);
      cp_async16(place, k_row, take);
      cp_async16(place + Shape::kTileBytes, v_row, take);
    }
  }

  __device__ void use(int token, const char* keys) {
    float s[2][4] = {};  // [8 tokens, fragment]
    multiply_keys(s, keys);
    const bool inner = all_wanted(token);
    float raised[2] = {highest_[0], highest_[1]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = s[j][i] * scale_;
        if (p_.soft_cap > 0) x = p_.soft_cap * kLog2e * tanh_by_exp2(x);
        if (!inner && !wanted(token + j * 8 + lane_ % 4 * 2 + (i & 1))) x = -INFINITY;
        s[j][i] = x;
        raised[i / 2] = fmaxf(raised[i / 2], x);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raised[half] = fmaxf(raised[half], __shfl_xor_sync(~0u, raised[half], 1));
      raised[half] = fmaxf(raised[half], __shfl_xor_sync(~0u, raised[half], 2));
    }
    // As a rule no maximum moves, and the sums stay as they are.
    if (__any_sync(~0u, raised[0] > highest_[0] || raised[1] > highest_[1])) {
      const float fade[2] = {exp2_fast(highest_[0] - raised[0]),
                             exp2_fast(highest_[1] - raised[1])};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[n][i] *= fade[i / 2];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total_[half] *= fade[half];
        highest_[half] = raised[half];
      }
    }
    uint32_t weights[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = exp2_fast(s[j][half * 2] - highest_[half]);
        const float high = exp2_fast(s[j][half * 2 + 1] - highest_[half]);
        total_[half] += low + high;
        weights[j * 2 + half] = pack2<T>(low, high);
      }
    }
    multiply_values(weights, keys + Shape::kTileBytes);
  }

  __device__ void multiply_keys(float (&s)[2][4], const char* keys) {
    if constexpr (Shape::kFp8) {
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; chunk += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint4 bytes = *reinterpret_cast<const uint4*>(
              keys + Shape::place(j * 8 + lane_ / 4, chunk + lane_ % 4));
          const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            multiply(s[j], chunk + i, e4m3x2_to_half2(words[i]), e4m3x2_to_half2(words[i] >> 16));
          }
        }
      }
    } else {
      const int row = lane_ / 16 * 8 + lane_ % 8;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + Shape::place(row, step * 2 + lane_ / 8 % 2));
        multiply(s[0], step, b[0], b[1]);
        multiply(s[1], step, b[2], b[3]);
      }
    }
  }

  __device__ void multiply_values(const uint32_t (&weights)[4], const char* values) {
    const int row = lane_ / 8 % 2 * 8 + lane_ % 8;
#pragma unroll
    for (int pair = 0; pair < Shape::kChunks / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + Shape::place(row, pair * 2 + lane_ / 16));
      if constexpr (Shape::kFp8) {
        // A 2-byte element is two channels of one token: split into even and odd channels.
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          const uint32_t low = b[chunk * 2], high = b[chunk * 2 + 1];
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const uint32_t selector = odd ? 0x4431 : 0x4420;
            mma_m16n8k16<T>(o_[pair * 4 + chunk * 2 + odd], weights,
                            e4m3x2_to_half2(__byte_perm(low, 0, selector)),
                            e4m3x2_to_half2(__byte_perm(high, 0, selector)));
          }
        }
      } else {
        mma_m16n8k16<T>(o_[pair * 2], weights, b[0], b[1]);
        mma_m16n8k16<T>(o_[pair * 2 + 1], weights, b[2], b[3]);
      }
    }
  }

  // The channel that element i of o_[n] stands for.
  __device__ int channel_of(int n, int i) const {
    return Shape::kFp8 ? n / 2 * 16 + lane_ % 4 * 4 + i * 2 + n % 2 : n * 8 + lane_ % 4 * 2 + i;
  }

  __device__ int64_t part(int row, int split) const {
    return (int64_t{w_.sequence} * p_.num_q_heads + w_.first_head + row) * p_.num_splits + split;
  }

  const Decode& p_;
  const DecodeWork w_;
  const int warp_, lane_;
  int lane_row_, lane_chunk_;
  float scale_;  // of logits: to base 2, or to parts of the cap
  const char *k_, *v_;
  const int32_t* table_;
  int64_t block_;
  uint32_t q_[Shape::kQueriesInShared ? 1 : kDim / 16][4];
  float o_[kDim / 8][4] = {};
  float highest_[2] = {kLowest, kLowest};
  float total_[2] = {};  // of this lane's columns
};

template <class KV, int kDim, bool kWholePages>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(const __grid_constant__ Decode p) {
  const DecodeWork w = decode_work(p);
  if (w.last_split == 0) {  // an empty sequence
    if (w.split > 0) return;
    for (int at = threadIdx.x; at < w.num_rows * kDim; at += kDecodeThreads) {
      finish_element(p, w, at / kDim, at % kDim, kLowest, 0, 0);
    }
    return;
  }
  if (w.split < w.first_split || w.split >= w.last_split) return;
  DecodeBlock<KV, kDim, kWholePages> block(p, w);
  block.attend();
  block.merge_warps();
  if (w.last_split - w.first_split > 1 && block.is_last()) block.merge_splits();
}

template <class KV, int kDim>
auto decode_kernel_for(const Decode& p) {
  return p.block_size % kDecodeRows == 0 ? &decode_kernel<KV, kDim, true>
                                         : &decode_kernel<KV, kDim, false>;
}

template <class KV, int kDim>
void decode_with(const Decode& p, cudaStream_t stream) {
  const int64_t group_tiles = ceil_div(p.num_q_heads / p.num_kv_heads, kDecodeRows);
  const int64_t ctas = p.num_items * p.num_kv_heads * group_tiles;
  launch("paged_decode", decode_kernel_for<KV, kDim>(p), ctas, kDecodeThreads,
         DecodeShape<KV, kDim>::kSharedBytes, stream, p);
}

template <class KV, int kDim>
int64_t decode_slots_with(const Decode& p) {
  return resident_ctas(decode_kernel_for<KV, kDim>(p), kDecodeThreads,
                       DecodeShape<KV, kDim>::kSharedBytes);
}

}  // namespace kvxfer::kernels::cuda
