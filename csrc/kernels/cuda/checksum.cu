// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// checksum_blocks: four lanes per row, so that a row's sum takes two exchanges and a warp has eight
// rows under way; one addition per thread block and layer.
#include <algorithm>

#include "kernels/checksum.hpp"
#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanesPerRow = 4;
constexpr int kRowsPerWarp = 32 / kLanesPerRow;
constexpr int kCtasPerSm = 3;

// The little-endian word at byte `at` of a row; bytes from its end on are 0.
__device__ uint32_t word_at(const char* row, int32_t nbytes, int32_t at) {
  uint32_t word = 0;
  for (int i = 0; i < 4 && at + i < nbytes; ++i) {
    word |= uint32_t{static_cast<uint8_t>(row[at + i])} << (8 * i);
  }
  return word;
}

// A row's sum, by the lanes of a group: `lane` of kLanes has every kLanes-th 16 bytes of it.
template <int kLanes>
__device__ uint64_t sum_of_chunks(const char* row, int32_t nbytes, int lane, const uint4* keys) {
  uint64_t sum = 0;
#pragma unroll 4
  for (int32_t chunk = lane; chunk < nbytes / 16; chunk += kLanes) {
    const uint4 words = __ldcs(reinterpret_cast<const uint4*>(row) + chunk);
    const uint4 key = keys[chunk];
    sum += hash_pair(words.x, words.y, key.x, key.y) + hash_pair(words.z, words.w, key.z, key.w);
  }
  return sum;
}

// The same of a row that begins or ends anywhere.
template <int kLanes>
__device__ uint64_t sum_of_pairs(const char* row, int32_t nbytes, int lane, const uint32_t* keys) {
  uint64_t sum = 0;
  for (int32_t pair = lane; pair * 8 < nbytes; pair += kLanes) {
    sum += hash_pair(word_at(row, nbytes, pair * 8), word_at(row, nbytes, pair * 8 + 4),
                     keys[pair * 2], keys[pair * 2 + 1]);
  }
  return sum;
}

template <int kLanes>
__device__ uint64_t sum_over_lanes(uint64_t value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(~0u, static_cast<unsigned long long>(value), mask);
  }
  return value;
}

// A thread block has one layer and a share of its (part, segment) tiles.
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    checksum_kernel(const __grid_constant__ Checksum p, Divisor by_heads, Divisor by_segments,
                    int32_t ctas_per_layer) {
  const int layer = static_cast<int>(blockIdx.x) / ctas_per_layer;
  const auto num_segments = static_cast<int32_t>(p.num_segments);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* keys = reinterpret_cast<uint32_t*>(shared_memory());                  // [kMaxHashedRow / 4]
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory() + kMaxHashedRow);  // [warp]
  for (int i = threadIdx.x; i < kMaxHashedRow / 4; i += kThreads) keys[i] = hash_key(i);
  __syncthreads();
  uint64_t sum = 0;
  for (int32_t tile = static_cast<int>(blockIdx.x) % ctas_per_layer;
       tile < p.num_parts * num_segments; tile += ctas_per_layer) {
    const int32_t index = by_segments.quotient(tile);
    const ChecksumPart& part = p.part[index];
    const int64_t* segment = p.segments + int64_t{tile - index * num_segments} * 4;
    const char* base =
        reinterpret_cast<const char*>(p.bases[int64_t{index} * p.num_layers + layer]) +
        row_offset(part.strides, segment[0], segment[1], 0);
    const int64_t everything =
        reinterpret_cast<int64_t>(base) | part.strides.token | part.strides.head | part.row_nbytes;
    const auto rows = static_cast<int32_t>(segment[2]) * p.num_heads;
    for (int32_t first = warp * kRowsPerWarp; first < rows; first += kWarps * kRowsPerWarp) {
      const int32_t row = first + lane / kLanesPerRow;
      const int32_t token = by_heads.quotient(row), head = row - token * p.num_heads;
      const char* at = base + token * part.strides.token + head * part.strides.head;
      const int turn = lane % kLanesPerRow;
      uint64_t pairs = 0;
      if (row < rows) {
        pairs = everything % 16 == 0
                    ? sum_of_chunks<kLanesPerRow>(at, part.row_nbytes, turn,
                                                  reinterpret_cast<const uint4*>(keys))
                    : sum_of_pairs<kLanesPerRow>(at, part.row_nbytes, turn, keys);
      }
      pairs = sum_over_lanes<kLanesPerRow>(pairs);
      if (turn == 0 && row < rows) {
        sum += hash_row(pairs, part.id, p.layers[layer], p.first_head + head, segment[3] + token);
      }
    }
  }
  sum = sum_over_lanes<32>(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) sum += sums[i];
    atomicAdd(reinterpret_cast<unsigned long long*>(p.sums + layer),
              static_cast<unsigned long long>(sum));
  }
}

}  // namespace

void checksum_blocks(const Checksum& p, cudaStream_t stream) {
  if (p.num_segments == 0 || p.num_layers == 0 || p.num_parts == 0 || p.num_heads == 0) return;
  for (int i = 0; i < p.num_parts; ++i) {
    if (p.part[i].row_nbytes > kMaxHashedRow) {
      fail(Code::kInvalidArgument, "checksum_blocks: expected rows of at most ", kMaxHashedRow,
           " bytes, given ", p.part[i].row_nbytes);
    }
  }
  if (p.num_parts * p.num_segments > INT32_MAX) {
    fail(Code::kInvalidArgument, "checksum_blocks: expected fewer than 2^31 runs of tokens, given ",
         p.num_segments, " in each of ", p.num_parts, " parts");
  }
  const int64_t fill = ceil_div(int64_t{num_sms()} * kCtasPerSm, p.num_layers);
  const auto per_layer = static_cast<int32_t>(std::min(fill, p.num_parts * p.num_segments));
  launch("checksum_blocks", &checksum_kernel, int64_t{per_layer} * p.num_layers, kThreads,
         kWarps * sizeof(uint64_t) + kMaxHashedRow, stream, p, Divisor(p.num_heads),
         Divisor(static_cast<int32_t>(p.num_segments)), per_layer);
}

}  // namespace kvxfer::kernels::cuda
