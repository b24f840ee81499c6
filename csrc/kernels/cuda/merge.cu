// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// merge_states: two partial attentions over disjoint keys become one; a warp per (row, head).
#include "kernels/cuda/device.cuh"

namespace kvxfer::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Merge p) {
  const int64_t unit = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (unit >= p.num_rows * p.num_heads) return;
  const int64_t row = unit / p.num_heads, head = unit - row * p.num_heads;
  const float lse_a = p.lse_a[row * p.lse_a_row + head * p.lse_a_head];
  const float lse_b = p.lse_b[row * p.lse_b_row + head * p.lse_b_head];
  const float highest = fmaxf(lse_a, lse_b);
  const float finite = highest == -INFINITY ? 0.0f : highest;  // -inf - -inf would be NaN
  const float weight_a = expf(lse_a - finite), weight_b = expf(lse_b - finite);
  const float total = weight_a + weight_b, safe = total > 0 ? total : 1.0f;
  const T* a = static_cast<const T*>(p.v_a) + row * p.a_row + head * p.a_head;
  const T* b = static_cast<const T*>(p.v_b) + row * p.b_row + head * p.b_head;
  T* out = static_cast<T*>(p.out) + unit * p.width;
  for (int i = threadIdx.x % 32; i < p.width; i += 32) {
    // A side of weight 0 may hold anything, also NaN: it was never written.
    const float from_a = weight_a > 0 ? widen(a[i]) * weight_a : 0.0f;
    const float from_b = weight_b > 0 ? widen(b[i]) * weight_b : 0.0f;
    out[i] = narrow<T>((from_a + from_b) / safe);
  }
  if (threadIdx.x % 32 == 0) p.lse[unit] = total > 0 ? logf(total) + finite : -INFINITY;
}

}  // namespace

void merge_states(const Merge& p, cudaStream_t stream) {
  const int64_t ctas = ceil_div(p.num_rows * p.num_heads * 32, kThreads);
  if (ctas == 0) return;
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 1) {
      fail(Code::kInvalidArgument, "merge_states: expected no fp8");
    } else {
      launch("merge_states", &merge_kernel<T>, ctas, kThreads, 0, stream, p);
    }
  });
}

}  // namespace kvxfer::kernels::cuda
