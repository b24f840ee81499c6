// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// pack, unpack and copy of blocks: all layers and parts in one launch, through a table of
// addresses. A tile is one segment of one layer's part; a tile is located once, its rows are walked
// without divisions.
#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.hpp"

namespace kvxfer::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // accesses per thread between the first load and the first store
constexpr int kCtasPerSm = 8;

struct Tile {
  const char* src;
  char* dst;
  int32_t tokens;
  const CopyPart* part;
};

__device__ Tile locate(const Copy& p, int64_t index) {
  const int64_t entry = index / p.num_segments;
  const int64_t* segment = p.segments + (index - entry * p.num_segments) * 5;
  const CopyPart& part = p.part[entry / p.num_layers];
  return {reinterpret_cast<const char*>(p.bases[entry * 2]) +
              row_offset(part.src, segment[0], segment[1], 0),
          reinterpret_cast<char*>(p.bases[entry * 2 + 1]) +
              row_offset(part.dst, segment[2], segment[3], 0),
          static_cast<int32_t>(segment[4]), &part};
}

template <class V>
__global__ void __launch_bounds__(kThreads) copy_bytes(const __grid_constant__ Copy p) {
  const int64_t tiles = int64_t{p.num_parts} * p.num_layers * p.num_segments;
  constexpr int64_t kBytes = sizeof(V);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = locate(p, index);
    RowWalk walk(p.num_heads, tile.part->width / static_cast<int32_t>(kBytes), threadIdx.x,
                 kThreads);
    while (walk.token < tile.tokens) {
      V value[kInFlight];
      int64_t to[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const bool inside = walk.token < tile.tokens;
        to[i] = inside ? walk.offset(tile.part->dst, kBytes) : -1;
        // .cs: read once, so it need not stay in the caches.
        if (inside)
          value[i] =
              __ldcs(reinterpret_cast<const V*>(tile.src + walk.offset(tile.part->src, kBytes)));
        walk.advance();
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (to[i] >= 0) __stcs(reinterpret_cast<V*>(tile.dst + to[i]), value[i]);
      }
    }
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) copy_converted(const __grid_constant__ Copy p) {
  const int64_t tiles = int64_t{p.num_parts} * p.num_layers * p.num_segments;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = locate(p, index);
    RowWalk walk(p.num_heads, tile.part->width, threadIdx.x, kThreads);
    for (; walk.token < tile.tokens; walk.advance()) {
      const auto* from =
          reinterpret_cast<const From*>(tile.src + walk.offset(tile.part->src, sizeof(From)));
      auto* to = reinterpret_cast<To*>(tile.dst + walk.offset(tile.part->dst, sizeof(To)));
      *to = narrow<To>(widen(*from));
    }
  }
}

unsigned num_ctas(const Copy& p) {
  const int64_t tiles = int64_t{p.num_parts} * p.num_layers * p.num_segments;
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t limit = p.max_ctas > 0 ? p.max_ctas : int64_t{std::max(sms, 1)} * kCtasPerSm;
  return static_cast<unsigned>(std::min(tiles, limit));
}

}  // namespace

void copy_rows(const Copy& p, cudaStream_t stream) {
  if (p.num_segments == 0 || p.num_layers == 0 || p.num_parts == 0 || p.num_heads == 0) return;
  if (p.num_parts > kMaxParts) {
    fail(Code::kInvalidArgument, "parts: expected at most ", kMaxParts, ", given ", p.num_parts);
  }
  const unsigned ctas = num_ctas(p);
  if (p.convert) {
    with_type(p.from, [&](auto from) {
      with_type(p.to, [&](auto to) {
        copy_converted<decltype(from), decltype(to)><<<ctas, kThreads, 0, stream>>>(p);
      });
    });
  } else {
    with_access(p.access, [&](auto access) {
      copy_bytes<decltype(access)><<<ctas, kThreads, 0, stream>>>(p);
    });
  }
  check_launch("copy_blocks");
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to keep
    return 0;
  }
  return count;
}

}  // namespace kvxfer::kernels::cuda
