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

constexpr int64_t kWorthWaking = 1 << 20;  // bytes: less is copied before a thread is awake
constexpr int64_t kBytesPerItem = 1 << 18;

// The largest magnitude that a scaled row may have: all of a dtype's range.
float range_of(DType dtype) {
  return dtype == DType::kInt8 ? 127.0f : dtype == DType::kFloat8E5M2 ? 57344.0f : 448.0f;
}

// One side of an append, keys or values, and what is the same for all of its tokens.
class SideRows {
 public:
  SideRows(const Append& p, const Rows& rows, const Cache& cache, const Scales& scales,
           int64_t width, float scale)
      : from(static_cast<const char*>(rows.data)),
        to(static_cast<char*>(cache.data)),
        rows(rows),
        cache(cache),
        scales(scales),
        width(width),
        heads(p.num_kv_heads),
        scale(scale),
        same(rows.dtype == cache.dtype && scale == 1.0f && scales.data == nullptr),
        from_size(itemsize(rows.dtype)),
        to_size(itemsize(cache.dtype)),
        // Of one token: heads that lie side by side, here and there, are one run.
        shape(collapse_rows(width * to_size, 1, heads, {0, 0, rows.stride_head * from_size},
                            {0, 0, cache.strides.head * to_size})) {}

  void append(int64_t token, SlotPosition at) const {
    const char* src = from + token * rows.stride_row * from_size;
    char* dst = to + row_offset(cache.strides, at.block, at.offset, 0) * to_size;
    if (same) {
      for (int64_t i = 0; i < shape.outer; ++i)
        std::memcpy(dst + i * shape.dst_outer, src + i * shape.src_outer,
                    static_cast<size_t>(shape.run));
      return;
    }
    for (int64_t head = 0; head < heads; ++head)
      convert(src + head * rows.stride_head * from_size, dst + head * cache.strides.head * to_size,
              at, head);
  }

 private:
  void convert(const char* src, char* dst, SlotPosition at, int64_t head) const {
    float divisor = scale;
    if (scales.data != nullptr) {
      const float top = isa().largest(src, rows.dtype, width);
      divisor = top > 0 ? top / range_of(cache.dtype) : 1.0f;
      scales.data[row_offset(scales.strides, at.block, at.offset, head)] = divisor;
    }
    isa().convert(src, rows.dtype, dst, cache.dtype, width, 1.0f, divisor);
  }

  const char* from;
  char* to;
  const Rows& rows;
  const Cache& cache;
  const Scales& scales;
  int64_t width, heads;
  float scale;
  bool same;
  int64_t from_size, to_size;
  RunShape shape;
};

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
  const SideRows keys(p, p.key, p.k, p.k_scales, p.head_dim, p.k_scale);
  const SideRows values(p, p.value, p.v, p.v_scales, p.head_dim_v, p.v_scale);
  // Stretches of whole tokens; two tokens with one slot have no defined order anyway.
  parallel_for(ceil_div(p.num_tokens, per_item), 0, p.num_tokens * row_bytes > kWorthWaking,
               [&](int64_t i, void*) {
                 const int64_t end = std::min(p.num_tokens, (i + 1) * per_item);
                 for (int64_t token = i * per_item; token < end; ++token) {
                   if (p.slots[token] < 0) continue;
                   const SlotPosition at = split_slot(p.slots[token], p.block_size);
                   keys.append(token, at);
                   values.append(token, at);
                 }
               });
}

}  // namespace kvxfer::kernels::cpu
