// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// pack, unpack and copy of blocks: all layers and parts in one launch, through a table of
// addresses.
#include <algorithm>

#include "kernels/cuda/copy_tile.cuh"

namespace kvxfer::kernels::cuda {
namespace {

constexpr int kInFlight = 4;  // accesses per thread between the first load and the first store
constexpr int kCtasPerSm = 8;

template <class V>
__global__ void __launch_bounds__(kCopyThreads) copy_bytes(const __grid_constant__ Copy p) {
  constexpr int64_t kBytes = sizeof(V);
  for (int64_t index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const CopyTile tile = locate(p, index);
    RowWalk walk(p.num_heads, tile.part->width / static_cast<int32_t>(kBytes), threadIdx.x,
                 kCopyThreads);
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

int64_t num_ctas(const Copy& p) {
  const int64_t tiles = int64_t{p.num_parts} * p.num_layers * p.num_segments;
  const int64_t limit = p.max_ctas > 0 ? p.max_ctas : int64_t{num_sms()} * kCtasPerSm;
  return std::min(tiles, limit);
}

}  // namespace

void copy_rows(const Copy& p, cudaStream_t stream) {
  if (p.num_segments == 0 || p.num_layers == 0 || p.num_parts == 0 || p.num_heads == 0) return;
  if (p.num_parts > kMaxParts) {
    fail(Code::kInvalidArgument, "parts: expected at most ", kMaxParts, ", given ", p.num_parts);
  }
  if (p.convert) {
    with_type(p.from,
              [&](auto from) { copy_converted_from<decltype(from)>(p, num_ctas(p), stream); });
  } else {
    with_access(p.access, [&](auto access) {
      launch("copy_blocks", &copy_bytes<decltype(access)>, num_ctas(p), kCopyThreads, 0, stream, p);
    });
  }
}

void place_tables(Copy& p, const void* at) {
  p.bases = static_cast<const int64_t*>(at);
  p.segments = p.bases + int64_t{p.num_parts} * p.num_layers * 2;
  p.scales = p.scaled ? reinterpret_cast<const float*>(p.segments + p.num_segments * 5) : nullptr;
}

uint64_t capture_id(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  if (error != cudaSuccess) fail(Code::kInternal, "capture_id: ", cudaGetErrorString(error));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace kvxfer::kernels::cuda
