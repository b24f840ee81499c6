// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// paged_decode: a thread block takes one split of one sequence's keys for one KV head, whose group
// of query heads fills the 16 rows of a tensor-core product. Each warp loads, awaits and uses its
// own quarter of a tile's tokens, so the loop holds no block-wide barrier. The last block of a
// sequence and head to finish sums the splits in their order: bitwise repeatable.
#pragma once

#include "kernels/cuda/decode_work.cuh"

namespace kvxfer::kernels::cuda {

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
      for (int quad = warp_; quad < kDim / 64; quad += kDecodeWarps) {
        uint32_t a[4][4];
        load_fragments(quad, a);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          *shared_fragment(quad * 4 + i) = {a[i][0], a[i][1], a[i][2], a[i][3]};
        }
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int quad = 0; quad < kDim / 64; ++quad) {
        load_fragments(quad, reinterpret_cast<uint32_t (&)[4][4]>(q_[quad * 4]));
      }
    }
  }

  // All tiles of this split; fills o_, highest_, total_.
  __device__ void attend() {
    const int first = w_.begin / Shape::kTile, last = (w_.end + Shape::kTile - 1) / Shape::kTile;
    look_up(first);
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
      use(first_token(tile), tile_memory(stage));
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

  // Eight splits at a time, so that many loads are under way at once. The order of a sequence's
  // sums follows from its length alone.
  __device__ void merge_splits() {
    constexpr int kAtOnce = 8;
    for (int at = threadIdx.x; at < w_.num_rows * (kDim / 4); at += kDecodeThreads) {
      const int row = at / (kDim / 4), channel = at % (kDim / 4) * 4;
      const float* lse = p_.partial_lse + part(row, 0);
      const float* values = p_.partial + part(row, 0) * kDim + channel;
      float highest = kLowest, total = 0, sum[4] = {};
      for (int begin = w_.first_split; begin < w_.last_split; begin += kAtOnce) {
        float one[kAtOnce];
        float4 value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t split = min(begin + i, w_.last_split - 1);
          one[i] = begin + i < w_.last_split ? __ldcg(lse + split) : -INFINITY;
          value[i] = __ldcg(reinterpret_cast<const float4*>(values + split * kDim));
        }
        float raised = highest;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) raised = fmaxf(raised, one[i]);
        const float fade = exp2_fast(highest - raised);
        highest = raised;
        total *= fade;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] *= fade;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float weight = exp2_fast(one[i] - highest);
          total += weight;
          sum[0] += value[i].x * weight;
          sum[1] += value[i].y * weight;
          sum[2] += value[i].z * weight;
          sum[3] += value[i].w * weight;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        finish_element(p_, w_, row, channel + i, highest, total, sum[i]);
      }
    }
  }

 private:
  // The queries' fragments of steps 4 * quad to 4 * quad + 3: 64 channels.
  __device__ void load_fragments(int quad, uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_ / 4 + half * 8;
      const bool inside = row < w_.num_rows;
      const uint16_t* from = static_cast<const uint16_t*>(p_.q) + w_.sequence * p_.q_batch +
                             (w_.first_head + row) * p_.q_head + quad * 64;
      if constexpr (Shape::kFp8) {
        // K's channels in fp8 come as 16 adjacent bytes per lane; queries follow that order.
        uint32_t words[8] = {};
        if (inside) {
          const auto* wide = reinterpret_cast<const uint4*>(from + lane_ % 4 * 16);
          const uint4 low = wide[0], high = wide[1];
          const uint32_t given[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) words[i] = as_operand(given[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i][half] = words[i * 2];
          a[i][half + 2] = words[i * 2 + 1];
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto* pair = reinterpret_cast<const uint32_t*>(from + i * 16 + lane_ % 4 * 2);
          a[i][half] = inside ? pair[0] : 0;
          a[i][half + 2] = inside ? pair[4] : 0;
        }
      }
    }
  }

  // Two query channels in the dtype of the product; fp8 is multiplied in fp16.
  __device__ uint32_t as_operand(uint32_t bits) const {
    if (p_.q_type != Element::kBFloat16) return bits;
    const float low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xffff0000u);
    return pack2<T>(fminf(fmaxf(low, -65504.0f), 65504.0f),
                    fminf(fmaxf(high, -65504.0f), 65504.0f));
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

  // The first of the tokens that this warp has of a tile.
  __device__ int first_token(int tile) const {
    return tile * Shape::kTile + warp_ * Shape::kTokens;
  }
  __device__ bool wanted(int token) const { return token >= w_.begin && token < w_.end; }

  // This warp's rows of a stage: K, and V at kTileBytes behind.
  __device__ char* tile_memory(int stage) const {
    return shared_memory() + stage * 2 * Shape::kTileBytes +
           warp_ * Shape::kTokens * Shape::kRowBytes;
  }

  __device__ bool any_wanted(int token) const {  // of 16
    return token < w_.end && token + kDecodeRows > w_.begin;
  }
  __device__ bool all_wanted(int token) const {
    return token >= w_.begin && token + kDecodeRows <= w_.end;
  }

  // For each group the block id of this warp's page, or of the row that this lane looks after.
  // Entries that hold no wanted token are not looked at: they may be -1, or beyond the table.
  __device__ void look_up(int tile) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int token = first_token(tile) + group * kDecodeRows;
      const int mine = token + (kWholePages ? 0 : lane_ % kDecodeRows);
      const bool useful = kWholePages ? any_wanted(token) : wanted(mine);
      block_[group] = useful ? table_[p_.by_block_size.quotient(mine)] : 0;
    }
  }

  // Starts the copies of a tile, whose ids block_ holds, and looks up the ids of the next one.
  __device__ void issue(int tile, int stage) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int token = first_token(tile) + group * kDecodeRows;
      if (kWholePages && all_wanted(token)) {
        copy_rows<true>(group, token, tile_memory(stage));
      } else if (!kWholePages || any_wanted(token)) {  // shuffles want no branch around them
        copy_rows<false>(group, token, tile_memory(stage));
      }
    }
    look_up(tile + 1);
  }

  template <bool kAll>
  __device__ void copy_rows(int group, int token, char* to) const {
    const int mine = token + (kWholePages ? 0 : lane_ % kDecodeRows);
    const int64_t slot = mine - p_.by_block_size.quotient(mine) * p_.block_size;
    const int64_t k_offset = block_[group] * p_.k_strides.block + slot * p_.k_strides.token;
    const int64_t v_offset = block_[group] * p_.v_strides.block + slot * p_.v_strides.token;
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
      char* place = to + Shape::place(group * kDecodeRows + row, lane_chunk_);
      cp_async16(place, k_row, take);
      cp_async16(place + Shape::kTileBytes, v_row, take);
    }
  }

  __device__ void use(int token, const char* keys) {
    if (token >= w_.end || token + Shape::kTokens <= w_.begin) return;
    const bool inner = token >= w_.begin && token + Shape::kTokens <= w_.end;
    float s[Shape::kGroups * 2][4] = {};  // [8 tokens, fragment]
    multiply_keys(s, keys);
    float raised[2] = {highest_[0], highest_[1]};
#pragma unroll
    for (int j = 0; j < Shape::kGroups * 2; ++j) {
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
    if (__any_sync(~0u, raised[0] > highest_[0] || raised[1] > highest_[1])) raise(raised);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      uint32_t weights[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&x)[4] = s[group * 2 + j];
          const float low = exp2_fast(x[half * 2] - highest_[half]);
          const float high = exp2_fast(x[half * 2 + 1] - highest_[half]);
          total_[half] += low + high;
          weights[j * 2 + half] = pack2<T>(low, high);
        }
      }
      // A group without a wanted token was not copied: whatever lies there may be NaN.
      if (Shape::kGroups == 1 || inner || any_wanted(token + group * kDecodeRows)) {
        multiply_values(weights, keys + Shape::kTileBytes + group * kGroupBytes);
      }
    }
  }

  __device__ void raise(const float (&raised)[2]) {
    const float fade[2] = {exp2_fast(highest_[0] - raised[0]), exp2_fast(highest_[1] - raised[1])};
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

  __device__ void multiply_keys(float (&s)[Shape::kGroups * 2][4], const char* keys) {
    if constexpr (Shape::kFp8) {
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; chunk += 4) {
#pragma unroll
        for (int j = 0; j < Shape::kGroups * 2; ++j) {
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
#pragma unroll
        for (int group = 0; group < Shape::kGroups; ++group) {
          uint32_t b[4];
          ldmatrix_x4(b, keys + group * kGroupBytes + Shape::place(row, step * 2 + lane_ / 8 % 2));
          multiply(s[group * 2], step, b[0], b[1]);
          multiply(s[group * 2 + 1], step, b[2], b[3]);
        }
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

  static constexpr int kGroupBytes = kDecodeRows * Shape::kRowBytes;

  const Decode& p_;
  const DecodeWork w_;
  const int warp_, lane_;
  int lane_row_, lane_chunk_;
  float scale_;  // of logits: to base 2, or to parts of the cap
  const char *k_, *v_;
  const int32_t* table_;
  int64_t block_[Shape::kGroups];
  uint32_t q_[Shape::kQueriesInShared ? 1 : kDim / 16][4];
  float o_[kDim / 8][4] = {};
  float highest_[2] = {kLowest, kLowest};
  float total_[2] = {};  // of this lane's columns
};

template <class KV, int kDim, bool kWholePages>
__global__ void __launch_bounds__(kDecodeThreads, DecodeShape<KV, kDim>::kMinBlocks)
    decode_kernel(const __grid_constant__ Decode p) {
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
