// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// append_kv: one warp per token and part (key or value); both parts in one launch, which is what
// bounds a decode step.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.hpp"

namespace kvxfer::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

template <class Row>
__device__ void for_token(const Append& p, Row row) {
  const int64_t unit = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  const int64_t token = unit / 2;
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const SlotPosition at = split_slot(slot, p.block_size);
  const AppendPart& part = p.part[unit % 2];
  const char* src = static_cast<const char*>(part.rows) + token * part.from.token;
  char* dst = static_cast<char*>(part.cache) + row_offset(part.to, at.block, at.offset, 0);
  row(part, src, dst, static_cast<int>(threadIdx.x % kWarp));
}

// Bytes as they are, in accesses of type V.
template <class V>
__global__ void __launch_bounds__(kThreads)
    append_bytes(const __grid_constant__ Append p, int32_t itemsize) {
  for_token(p, [&](const AppendPart& part, const char* src, char* dst, int lane) {
    const int32_t vectors = part.width * itemsize / static_cast<int32_t>(sizeof(V));
    RowWalk walk(p.num_kv_heads, vectors, lane, kWarp);
    for (; walk.token == 0; walk.advance()) {
      const int64_t in = walk.head * part.from.head + walk.vector * int64_t{sizeof(V)};
      const int64_t out = walk.head * part.to.head + walk.vector * int64_t{sizeof(V)};
      *reinterpret_cast<V*>(dst + out) = *reinterpret_cast<const V*>(src + in);
    }
  });
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) append_converted(const __grid_constant__ Append p) {
  for_token(p, [&](const AppendPart& part, const char* src, char* dst, int lane) {
    RowWalk walk(p.num_kv_heads, part.width, lane, kWarp);
    for (; walk.token == 0; walk.advance()) {
      const int64_t in = walk.head * part.from.head + walk.vector * int64_t{sizeof(From)};
      const int64_t out = walk.head * part.to.head + walk.vector * int64_t{sizeof(To)};
      // A true division, so that results equal those of engines bit for bit.
      const float value = __fdiv_rn(widen(*reinterpret_cast<const From*>(src + in)), part.scale);
      *reinterpret_cast<To*>(dst + out) = narrow<To>(value);
    }
  });
}

int64_t common_access(const Append& p) {
  int64_t width = 16;
  for (const AppendPart& part : p.part) {
    for (const int64_t value :
         {reinterpret_cast<int64_t>(part.rows), reinterpret_cast<int64_t>(part.cache),
          part.from.token, part.from.head, part.to.block, part.to.token, part.to.head,
          part.width * itemsize(p.to)}) {
      width = widen_access(width, value);
    }
  }
  return width;
}

}  // namespace

void append_kv(const Append& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return;
  const auto ctas = static_cast<unsigned>(ceil_div(p.num_tokens * 2 * kWarp, kThreads));
  if (p.from == p.to && p.part[0].scale == 1.0f && p.part[1].scale == 1.0f) {
    with_access(static_cast<int32_t>(common_access(p)), [&](auto access) {
      append_bytes<decltype(access)>
          <<<ctas, kThreads, 0, stream>>>(p, static_cast<int32_t>(itemsize(p.to)));
    });
  } else {
    with_type(p.from, [&](auto from) {
      with_type(p.to, [&](auto to) {
        append_converted<decltype(from), decltype(to)><<<ctas, kThreads, 0, stream>>>(p);
      });
    });
  }
  check_launch("append_kv");
}

}  // namespace kvxfer::kernels::cuda
