// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A tile of a block copy: one segment of one layer's part. It is located once, and its rows are
// walked without divisions.
#pragma once

#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {

inline constexpr int kCopyThreads = 256;

struct CopyTile {
  const char* src;
  char* dst;
  int32_t tokens;
  const CopyPart* part;
  const float* scales;  // [num_heads, 2]; none where the copy is not scaled
};

__device__ inline int64_t num_tiles(const Copy& p) {
  return int64_t{p.num_parts} * p.num_layers * p.num_segments;
}

__device__ inline CopyTile locate(const Copy& p, int64_t index) {
  const int64_t entry = index / p.num_segments;
  const int64_t* bases = p.bases;
  const int64_t* segments = p.segments;
  const float* scales = p.scales;
  if (!bases) {
    bases = reinterpret_cast<const int64_t*>(p.tables);
    segments = bases + int64_t{p.num_parts} * p.num_layers * 2;
    scales = reinterpret_cast<const float*>(segments + p.num_segments * 5);
  }
  const int64_t* segment = segments + (index - entry * p.num_segments) * 5;
  const CopyPart& part = p.part[entry / p.num_layers];
  return {reinterpret_cast<const char*>(bases[entry * 2]) +
              row_offset(part.src, segment[0], segment[1], 0),
          reinterpret_cast<char*>(bases[entry * 2 + 1]) +
              row_offset(part.dst, segment[2], segment[3], 0),
          static_cast<int32_t>(segment[4]), &part, scales + entry * p.num_heads * 2};
}

// Converts and scales. Each source dtype has a file of its own, to be compiled side by side.
template <class From>
void copy_converted_from(const Copy& p, int64_t ctas, cudaStream_t stream);

}  // namespace kvxfer::kernels::cuda
