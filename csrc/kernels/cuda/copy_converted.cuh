// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The converting half of a block copy: fp8 is quantised and dequantised in the same pass.
#pragma once

#include <type_traits>

#include "kernels/cuda/copy_tile.cuh"

namespace kvxfer::kernels::cuda {

// kCount elements per step: 8 where rows and accesses allow it, else 1.
template <class From, class To, int kCount>
__global__ void __launch_bounds__(kCopyThreads) copy_converted(const __grid_constant__ Copy p) {
  for (int64_t index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const CopyTile tile = locate(p, index);
    RowWalk walk(p.num_heads, tile.part->width / kCount, threadIdx.x, kCopyThreads);
    for (; walk.token < tile.tokens; walk.advance()) {
      Elements<From, kCount> from;
      Elements<To, kCount> to;
      from.load(tile.src + walk.offset(tile.part->src, from.kBytes));
      float scale = 1, divisor = 1;
      if (p.scales) {
        scale = tile.scales[walk.head * 2];
        divisor = tile.scales[walk.head * 2 + 1];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // A true division, so that results equal those of engines bit for bit.
        to.value[i] = narrow<To>(__fdiv_rn(__fmul_rn(widen(from.value[i]), scale), divisor));
      }
      to.store(tile.dst + walk.offset(tile.part->dst, to.kBytes));
    }
  }
}

// May every row be walked in eights? p.access divides all addresses, strides and the source's row.
template <class From, class To>
bool in_eights(const Copy& p) {
  constexpr int kWidest = std::max(Elements<From, 8>::kAccess, Elements<To, 8>::kAccess);
  bool whole = p.access % kWidest == 0;
  for (int i = 0; i < p.num_parts; ++i) whole = whole && p.part[i].width % 8 == 0;
  return whole;
}

template <class From>
void copy_converted_from(const Copy& p, int64_t ctas, cudaStream_t stream) {
  with_type(p.to, [&](auto to) {
    using To = decltype(to);
    if constexpr (!std::is_same_v<From, To> || std::is_same_v<From, E4m3>) {
      const auto kernel =
          in_eights<From, To>(p) ? &copy_converted<From, To, 8> : &copy_converted<From, To, 1>;
      launch("copy_blocks", kernel, ctas, kCopyThreads, 0, stream, p);
    } else {
      fail(Code::kInvalidArgument, "copy_blocks: scales apply to conversions and to fp8");
    }
  });
}

}  // namespace kvxfer::kernels::cuda
