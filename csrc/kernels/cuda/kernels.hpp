// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' launchers. All pointers are device pointers; nothing here synchronises. Shapes
// and dtypes are the caller's promise, and so are slots and block ids: they live on the device,
// where a look at them would cost a synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/dtype.hpp"
#include "kernels/index_math.hpp"

namespace kvxfer::kernels::cuda {

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
  DType from, to;
};

struct CopyPart {
  RowStrides src, dst;  // bytes
  int32_t width;        // elements of 1 byte where bytes are copied, else of the dtypes
};

inline constexpr int kMaxParts = 8;

struct Copy {
  CopyPart part[kMaxParts];
  const int64_t* bases;     // [num_parts, num_layers, 2]: addresses of source and destination
  const int64_t* segments;  // [num_segments, 5]: src block, slot, dst block, slot, tokens
  int32_t num_parts, num_layers, num_heads;
  int64_t num_segments;
  int32_t access;    // bytes per access, 16 or a smaller power of two that divides every address
  int32_t max_ctas;  // 0: as many as help
  bool convert;
  DType from, to;
};

void append_kv(const Append& params, cudaStream_t stream);
void copy_rows(const Copy& params, cudaStream_t stream);
int device_count();  // 0 also where there is no driver

}  // namespace kvxfer::kernels::cuda
