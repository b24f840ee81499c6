// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Appending to a paged cache.
#include <algorithm>
#include <cstring>

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

constexpr int64_t kWorthWaking = 1
                                 << 18;  // bytes: less is copied before a sleeping thread is awake
constexpr int64_t kBytesPerItem = 1 << 18;

// The largest magnitude that a scaled row may have: all of a dtype's range.
float range_of(DType dtype) {
  return dtype == DType::kInt8 ? 127.0f : dtype == DType::kFloat8E5M2 ? 57344.0f : 448.0f;
}

void append_rows(const Append& p, const Rows& rows, const Cache& cache, const Scales& scales,
                 int64_t width, float fixed_scale, int64_t token) {
  if (p.slots[token] < 0) return;
  const SlotPosition at = split_slot(p.slots[token], p.block_size);
  const bool same = rows.dtype == cache.dtype && fixed_scale == 1.0f && scales.data == nullptr;
  const char* src =
      static_cast<const char*>(rows.data) + token * rows.stride_row * itemsize(rows.dtype);
  char* dst = static_cast<char*>(cache.data);
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    const char* from = src + head * rows.stride_head * itemsize(rows.dtype);
    char* to = dst + row_offset(cache.strides, at.block, at.offset, head) * itemsize(cache.dtype);
    if (same) {
      std::memcpy(to, from, static_cast<size_t>(width * itemsize(cache.dtype)));
    } else {
      float scale = fixed_scale;
      if (scales.data != nullptr) {
        const float top = isa().largest(from, rows.dtype, width);
        scale = top > 0 ? top / range_of(cache.dtype) : 1.0f;
        scales.data[row_offset(scales.strides, at.block, at.offset, head)] = scale;
      }
      isa().convert(from, rows.dtype, to, cache.dtype, width, 1.0f, scale);
    }
  }
}

}  // namespace

void append_kv(const Append& p) {
  const int64_t num_slots = p.num_blocks * p.block_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    if (p.slots[i] < -1 || p.slots[i] >= num_slots) {
      fail(Code::kInvalidArgument, "slot_mapping[", i, "]: expected -1 or a slot from 0 to ",
           num_slots - 1, " (", p.num_blocks, " blocks of ", p.block_size, "), given ", p.slots[i]);
    }
  }
  const int64_t row_bytes = p.num_kv_heads * (p.head_dim + p.head_dim_v) * itemsize(p.k.dtype);
  const int64_t per_item = std::max<int64_t>(1, kBytesPerItem / std::max<int64_t>(1, row_bytes));
  // Stretches of whole tokens; two tokens with one slot have no defined order anyway.
  parallel_for(ceil_div(p.num_tokens, per_item), 0, p.num_tokens * row_bytes > kWorthWaking,
               [&](int64_t i, void*) {
                 const int64_t end = std::min(p.num_tokens, (i + 1) * per_item);
                 for (int64_t token = i * per_item; token < end; ++token) {
                   append_rows(p, p.key, p.k, p.k_scales, p.head_dim, p.k_scale, token);
                   append_rows(p, p.value, p.v, p.v_scales, p.head_dim_v, p.v_scale, token);
                 }
               });
}

}  // namespace kvxfer::kernels::cpu
