// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// append_kv: one warp per token and part (key or value); both parts in one launch, which is what
// bounds a decode step. fp8 is quantised in the same pass.
#include "kernels/cuda/device.cuh"

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

constexpr int kInFlight = 4;  // loads of a lane before its first store

// load(in, i) and store(out, i) for each of a lane's vectors: kInFlight loads, then their stores.
template <class Load, class Store>
__device__ void each_vector(const AppendPart& part, int32_t heads, int32_t vectors, int lane,
                            int32_t in_nbytes, int32_t out_nbytes, Load load, Store store) {
  RowWalk walk(heads, vectors, lane, kWarp);
  while (walk.token == 0) {
    int64_t to[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      to[i] = walk.token == 0 ? walk.head * part.to.head + walk.vector * int64_t{out_nbytes} : -1;
      if (to[i] >= 0) load(walk.head * part.from.head + walk.vector * int64_t{in_nbytes}, i);
      walk.advance();
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (to[i] >= 0) store(to[i], i);
    }
  }
}

// Bytes as they are, in accesses of type V.
template <class V>
__global__ void __launch_bounds__(kThreads)
    append_bytes(const __grid_constant__ Append p, int32_t row_itemsize) {
  for_token(p, [&](const AppendPart& part, const char* src, char* dst, int lane) {
    constexpr auto kBytes = static_cast<int32_t>(sizeof(V));
    V value[kInFlight];
    each_vector(
        part, p.num_kv_heads, part.width * row_itemsize / kBytes, lane, kBytes, kBytes,
        [&](int64_t in, int i) { value[i] = __ldcs(reinterpret_cast<const V*>(src + in)); },
        [&](int64_t out, int i) { *reinterpret_cast<V*>(dst + out) = value[i]; });
  });
}

template <class From, class To, int kCount>
__global__ void __launch_bounds__(kThreads) append_converted(const __grid_constant__ Append p) {
  for_token(p, [&](const AppendPart& part, const char* src, char* dst, int lane) {
    const Divider by = divider_of(part.scale, kNarrows<To>);
    Elements<From, kCount> from[kInFlight];
    each_vector(
        part, p.num_kv_heads, part.width / kCount, lane, Elements<From, kCount>::kBytes,
        Elements<To, kCount>::kBytes, [&](int64_t in, int i) { from[i].load(src + in); },
        [&](int64_t out, int i) {
          Elements<To, kCount> to;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            to.value[j] = narrow<To>(divide(widen(from[i].value[j]), by));
          }
          to.store(dst + out);
        });
  });
}

// The widest access to which every row of both parts is aligned.
int64_t common_access(const Append& p) {
  int64_t width = 16;
  for (const AppendPart& part : p.part) {
    for (const int64_t value :
         {reinterpret_cast<int64_t>(part.rows), reinterpret_cast<int64_t>(part.cache),
          part.from.token, part.from.head, part.to.block, part.to.token, part.to.head,
          part.width * itemsize(p.from), part.width * itemsize(p.to)}) {
      width = widen_access(width, value);
    }
  }
  return width;
}

template <class From, class To>
void append_as(const Append& p, int64_t ctas, cudaStream_t stream) {
  constexpr int kWidest = std::max(Elements<From, 8>::kAccess, Elements<To, 8>::kAccess);
  const bool in_eights =
      common_access(p) % kWidest == 0 && p.part[0].width % 8 == 0 && p.part[1].width % 8 == 0;
  const auto kernel = in_eights ? &append_converted<From, To, 8> : &append_converted<From, To, 1>;
  launch("append_kv", kernel, ctas, kThreads, 0, stream, p);
}

}  // namespace

void append_kv(const Append& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return;
  const int64_t ctas = ceil_div(p.num_tokens * 2 * kWarp, kThreads);
  if (p.from == p.to && p.part[0].scale == 1.0f && p.part[1].scale == 1.0f) {
    with_access(static_cast<int32_t>(common_access(p)), [&](auto access) {
      launch("append_kv", &append_bytes<decltype(access)>, ctas, kThreads, 0, stream, p,
             static_cast<int32_t>(itemsize(p.to)));
    });
    return;
  }
  with_type(p.from, [&](auto from) {
    using From = decltype(from);
    if constexpr (sizeof(From) == 1) {
      fail(Code::kInvalidArgument, "append_kv: rows of fp8 go into a cache of fp8 as they are");
    } else {
      with_type(p.to, [&](auto to) { append_as<From, decltype(to)>(p, ctas, stream); });
    }
  });
}

}  // namespace kvxfer::kernels::cuda
