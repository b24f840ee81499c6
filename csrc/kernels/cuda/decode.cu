// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which decode kernel runs a call.
#include "kernels/cuda/decode_variants.hpp"
#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {
namespace {

template <class KV>
void with_dim(const Decode& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return decode_with<KV, 64>(p, stream);
    case 128:
      return decode_with<KV, 128>(p, stream);
    default:
      return decode_with<KV, 256>(p, stream);
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
  if (reinterpret_cast<uintptr_t>(p.q) % 4 != 0 || p.q_batch % 2 != 0 || p.q_head % 2 != 0) {
    return "the cuda kernel takes query rows that begin at multiples of 4 bytes";
  }
  return nullptr;
}

void paged_decode(const Decode& p, cudaStream_t stream) {
  if (const char* reason = decode_refuses(p))
    fail(Code::kInvalidArgument, "paged_decode: ", reason);
  if (p.split_size <= 0 || p.split_size % kDecodeTile != 0) {
    fail(Code::kInvalidArgument, "split_size: expected a multiple of ", kDecodeTile, ", given ",
         p.split_size);
  }
  if (p.num_items == 0 || p.num_kv_heads == 0) return;
  switch (p.kv_type) {
    case Element::kFloat16:
      return with_dim<__half>(p, stream);
    case Element::kBFloat16:
      return with_dim<__nv_bfloat16>(p, stream);
    default:
      return with_dim<E4m3>(p, stream);
  }
}

}  // namespace kvxfer::kernels::cuda
