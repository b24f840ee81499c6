// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Appending to a paged cache, and copying rows between two of them.
#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

constexpr int64_t kWorthWaking = 1
                                 << 18;  // bytes: less is copied before a sleeping thread is awake
constexpr int64_t kBytesPerItem = 1 << 18;
// Past this total the destination would push everything else out of the caches, so stores go around
// them.
constexpr int64_t kStreamTotal = 8 << 20;
constexpr int64_t kStreamRun = 256;

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

void stream_copy(char* dst, const char* src, int64_t n) {
#if defined(__SSE2__)
  const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dst) & 63);
  if (n >= kStreamRun) {
    std::memcpy(dst, src, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + 64 <= n; i += 64) {
      const auto* from = reinterpret_cast<const __m128i*>(src + i);
      auto* to = reinterpret_cast<__m128i*>(dst + i);
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    dst += i, src += i, n -= i;
  }
#endif
  std::memcpy(dst, src, static_cast<size_t>(n));
}

// Stores that went around the caches are visible to others only after this; the pool's lock alone
// does not order them.
void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct CopyContext {
  const Copy& p;
  bool stream;

  void run_segment(int64_t layer, int64_t segment) const {
    const int64_t* s = p.segments + segment * 5;
    const char* src =
        reinterpret_cast<const char*>(p.bases[layer * 2]) + row_offset(p.src, s[0], s[1], 0);
    char* dst = reinterpret_cast<char*>(p.bases[layer * 2 + 1]) + row_offset(p.dst, s[2], s[3], 0);
    if (p.convert) return convert_rows(layer, src, dst, s[4]);
    const RunShape shape = collapse_rows(p.row_bytes, s[4], p.num_heads, p.src, p.dst);
    for (int64_t i = 0; i < shape.outer; ++i) {
      for (int64_t j = 0; j < shape.inner; ++j) {
        char* to = dst + i * shape.dst_outer + j * shape.dst_inner;
        const char* from = src + i * shape.src_outer + j * shape.src_inner;
        if (stream) {
          stream_copy(to, from, shape.run);
        } else {
          std::memcpy(to, from, static_cast<size_t>(shape.run));
        }
      }
    }
  }

  void convert_rows(int64_t layer, const char* src, char* dst, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const float* factor =
            p.factors == nullptr ? nullptr : p.factors + (layer * p.num_heads + h) * 2;
        isa().convert(src + t * p.src.token + h * p.src.head, p.src_dtype,
                      dst + t * p.dst.token + h * p.dst.head, p.dst_dtype, p.width,
                      factor == nullptr ? 1.0f : factor[0], factor == nullptr ? 1.0f : factor[1]);
      }
    }
  }
};

void check_segments(const Copy& p) {
  for (int64_t i = 0; i < p.num_segments; ++i) {
    const int64_t* s = p.segments + i * 5;
    const bool inside = s[0] >= 0 && s[0] < p.src_blocks && s[2] >= 0 && s[2] < p.dst_blocks &&
                        s[1] >= 0 && s[3] >= 0 && s[4] >= 0 && s[1] + s[4] <= p.src_block_size &&
                        s[3] + s[4] <= p.dst_block_size;
    if (!inside) {
      fail(Code::kInvalidArgument, "segments[", i, "]: expected blocks below ", p.src_blocks,
           " and ", p.dst_blocks, ", tokens within ", p.src_block_size, " and ", p.dst_block_size,
           "; given (", s[0], ", ", s[1], ", ", s[2], ", ", s[3], ", ", s[4], ")");
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

void copy_rows(const Copy& p) {
  check_segments(p);
  int64_t tokens = 0;
  for (int64_t i = 0; i < p.num_segments; ++i) tokens += p.segments[i * 5 + 4];
  const int64_t total = tokens * p.num_heads * p.row_bytes * p.num_layers;
  if (total == 0) return;
  const CopyContext context{p, total >= kStreamTotal};
  const int64_t pairs = p.num_layers * p.num_segments;
  const int64_t per_item =
      std::max<int64_t>(1, kBytesPerItem / std::max<int64_t>(1, total / pairs));
  parallel_for(ceil_div(pairs, per_item), 0, total > kWorthWaking, [&](int64_t i, void*) {
    const int64_t end = std::min(pairs, (i + 1) * per_item);
    for (int64_t pair = i * per_item; pair < end; ++pair) {
      context.run_segment(pair / p.num_segments, pair % p.num_segments);
    }
    if (context.stream) finish_streams();
  });
}

}  // namespace kvxfer::kernels::cpu
