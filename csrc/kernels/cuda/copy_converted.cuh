// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The converting half of a block copy: fp8 is quantised and dequantised in the same pass.
#pragma once

#include <type_traits>

#include "kernels/cuda/copy_tile.cuh"

namespace kvxfer::kernels::cuda {

// How many elements one thread takes at once: 16 bytes of the wider side where rows and accesses
// allow it, so that a warp's accesses are dense on both sides; else 1.
template <class From, class To>
inline constexpr int kWidest = 16 / static_cast<int>(std::max(sizeof(From), sizeof(To)));

template <class From, class To, int kCount>
__global__ void __launch_bounds__(kCopyThreads, 3) copy_converted(const __grid_constant__ Copy p) {
  // Loads of a thread before its first store.
  constexpr int kInFlight = kCount == 1 ? 1 : 4;
  for (int64_t index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const CopyTile tile = locate(p, index);
    RowWalk walk(p.num_heads, tile.part->width / kCount, threadIdx.x, kCopyThreads);
    while (walk.token < tile.tokens) {
      Elements<From, kCount> from[kInFlight];
      int64_t at[kInFlight];
      int32_t head[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const bool inside = walk.token < tile.tokens;
        at[i] = inside ? walk.offset(tile.part->dst, sizeof(To) * kCount) : -1;
        head[i] = walk.head;
        if (inside) from[i].load(tile.src + walk.offset(tile.part->src, sizeof(From) * kCount));
        walk.advance();
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at[i] < 0) continue;
        Elements<To, kCount> to;
        if (p.scaled) {
          const float scale = tile.scales[head[i] * 2];
          const Divider by = divider_of(tile.scales[head[i] * 2 + 1], kNarrows<To>);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            to.value[j] = narrow<To>(divide(__fmul_rn(widen(from[i].value[j]), scale), by));
          }
        } else {
#pragma unroll
          for (int j = 0; j < kCount; ++j) to.value[j] = narrow<To>(widen(from[i].value[j]));
        }
        to.store(tile.dst + at[i]);
      }
    }
  }
}

// May every row be walked in the widest steps? p.access divides all addresses, strides and the
// source's row.
template <class From, class To>
bool in_widest_steps(const Copy& p) {
  constexpr int kCount = kWidest<From, To>;
  constexpr int kAccess = std::max(Elements<From, kCount>::kAccess, Elements<To, kCount>::kAccess);
  bool whole = p.access % kAccess == 0;
  for (int i = 0; i < p.num_parts; ++i) whole = whole && p.part[i].width % kCount == 0;
  return whole;
}

template <class From>
void copy_converted_from(const Copy& p, int64_t ctas, cudaStream_t stream) {
  with_type(p.to, [&](auto to) {
    using To = decltype(to);
    if constexpr (!std::is_same_v<From, To> || std::is_same_v<From, E4m3>) {
      const auto kernel = in_widest_steps<From, To>(p)
                              ? &copy_converted<From, To, kWidest<From, To>>
                              : &copy_converted<From, To, 1>;
      launch("copy_blocks", kernel, ctas, kCopyThreads, 0, stream, p);
    } else {
      fail(Code::kInvalidArgument, "copy_blocks: scales apply to conversions and to fp8");
    }
  });
}

}  // namespace kvxfer::kernels::cuda
