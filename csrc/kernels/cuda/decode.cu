// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which decode kernel runs a call.
#include <type_traits>

#include "kernels/cuda/decode_variants.hpp"
#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {
namespace {

// Calls body(KV{}, width) with the dtype of the cache and the width of a head as types.
template <class KV, class Body>
auto with_dim(const Decode& p, Body body) {
  switch (p.head_dim) {
    case 64:
      return body(KV{}, std::integral_constant<int, 64>{});
    case 128:
      return body(KV{}, std::integral_constant<int, 128>{});
    default:
      return body(KV{}, std::integral_constant<int, 256>{});
  }
}

template <class Body>
auto with_variant(const Decode& p, Body body) {
  switch (p.kv_type) {
    case Element::kFloat16:
      return with_dim<__half>(p, body);
    case Element::kBFloat16:
      return with_dim<__nv_bfloat16>(p, body);
    default:
      return with_dim<E4m3>(p, body);
  }
}

bool on_16_bytes(const void* base, const RowStrides& strides) {
  int64_t access = 16;
  for (const int64_t n :
       {reinterpret_cast<int64_t>(base), strides.block, strides.token, strides.head}) {
    access = widen_access(access, n);
  }
  return access == 16;
}

}  // namespace

const char* decode_refuses(const Decode& p) {
  if (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256) {
    return "the cuda kernel takes a head_dim of 64, 128 or 256";
  }
  if (p.q_type != Element::kFloat16 && p.q_type != Element::kBFloat16) {
    return "the cuda kernel takes queries of float16 or bfloat16";
  }
  if (p.kv_type != p.q_type && p.kv_type != Element::kE4m3) {
    return "the cuda kernel takes a cache of the queries' dtype or of float8_e4m3";
  }
  if (!on_16_bytes(p.k, p.k_strides) || !on_16_bytes(p.v, p.v_strides)) {
    return "the cuda kernel takes cache rows that begin at multiples of 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(p.q) % 16 != 0 || p.q_batch % 8 != 0 || p.q_head % 8 != 0) {
    return "the cuda kernel takes query rows that begin at multiples of 16 bytes";
  }
  return nullptr;
}

void paged_decode(const Decode& params, cudaStream_t stream) {
  if (const char* reason = decode_refuses(params))
    fail(Code::kInvalidArgument, "paged_decode: ", reason);
  const bool adaptive = params.split_size == 0;
  const int32_t size = adaptive ? params.min_split : params.split_size;
  if (size <= 0 || size % kDecodeTile != 0) {
    fail(Code::kInvalidArgument, adaptive ? "min_split" : "split_size", ": expected a multiple of ",
         kDecodeTile, ", given ", size);
  }
  if (params.num_splits <= 0 || params.block_size <= 0) {
    fail(Code::kInvalidArgument, "num_splits, block_size: expected > 0, given ", params.num_splits,
         " and ", params.block_size);
  }
  if (params.num_items == 0 || params.num_kv_heads == 0) return;
  Decode p = params;
  p.by_block_size = Divisor(p.block_size);
  with_variant(p, [&](auto kv, auto dim) { decode_with<decltype(kv), dim()>(p, stream); });
}

int64_t decode_slots(const Decode& p) {
  return with_variant(p,
                      [&](auto kv, auto dim) { return decode_slots_with<decltype(kv), dim()>(p); });
}

}  // namespace kvxfer::kernels::cuda
