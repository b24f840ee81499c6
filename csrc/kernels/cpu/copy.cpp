// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Copying rows between two paged caches.
#include <algorithm>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace kvxfer::kernels::cpu {
namespace {

// Bytes: less is copied before a sleeping thread is awake.
constexpr int64_t kWorthWaking = 1 << 19;
constexpr int64_t kBytesPerItem = 1 << 18;
// From this total on stores go around the caches: source and destination are more than what one of
// several tenants has of a last-level cache of 32 MiB. Measured: 4 MiB are faster through it, 8 MiB
// and more around it.
constexpr int64_t kStreamTotal = 8 << 20;
constexpr int64_t kStreamRun = 256;

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

  // The rows of segments [first, end) in one part of one layer.
  void run(int64_t entry, int64_t first, int64_t end) const {
    const int64_t layer = entry % p.num_layers;
    const CopyPart& part = p.parts[entry / p.num_layers];
    const CopyBase& base = part.bases[layer];
    const char* from =
        reinterpret_cast<const char*>(p.src_pieces[base.src_piece]) + base.src_offset;
    char* to = reinterpret_cast<char*>(p.dst_pieces[base.dst_piece]) + base.dst_offset;
    RunShape shape{};
    int64_t tokens = 0;  // that the shape is for
    for (int64_t i = first; i < end; ++i) {
      const Segment& s = p.segments[i];
      const char* src = from + row_offset(part.src, s.src_block, s.src_slot, 0);
      char* dst = to + row_offset(part.dst, s.dst_block, s.dst_slot, 0);
      if (part.convert) {
        convert_rows(part, layer, src, dst, s.tokens);
        continue;
      }
      if (s.tokens != tokens) {
        tokens = s.tokens;
        shape = collapse_rows(part.row_bytes, tokens, p.num_heads, part.src, part.dst);
      }
      if (stream) {
        for_runs(shape, dst, src,
                 [&](char* at, const char* out) { stream_copy(at, out, shape.run); });
      } else {
        isa().copy_runs(dst, src, shape);
      }
    }
  }

  void convert_rows(const CopyPart& part, int64_t layer, const char* src, char* dst,
                    int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const float* factor =
            part.factors == nullptr ? nullptr : part.factors + (layer * p.num_heads + h) * 2;
        isa().convert(src + t * part.src.token + h * part.src.head, part.src_dtype,
                      dst + t * part.dst.token + h * part.dst.head, part.dst_dtype, part.width,
                      factor == nullptr ? 1.0f : factor[0], factor == nullptr ? 1.0f : factor[1]);
      }
    }
  }
};

}  // namespace

void copy_rows(const Copy& p) {
  int64_t tokens = 0, row_bytes = 0;
  for (int64_t i = 0; i < p.num_segments; ++i) tokens += p.segments[i].tokens;
  for (int64_t i = 0; i < p.num_parts; ++i) row_bytes += p.parts[i].row_bytes;
  const int64_t total = tokens * p.num_heads * row_bytes * p.num_layers;
  if (total == 0) return;
  const CopyContext context{p, total >= kStreamTotal};
  const int64_t count = p.num_parts * p.num_layers * p.num_segments;
  const int64_t per_item =
      std::max<int64_t>(1, kBytesPerItem / std::max<int64_t>(1, total / count));
  parallel_for(ceil_div(count, per_item), 0, total > kWorthWaking, [&](int64_t i, void*) {
    const int64_t end = std::min(count, (i + 1) * per_item);
    for (int64_t index = i * per_item; index < end;) {
      const int64_t entry = index / p.num_segments, first = index % p.num_segments;
      const int64_t last = std::min(p.num_segments, first + end - index);
      context.run(entry, first, last);
      index += last - first;
    }
    if (context.stream) finish_streams();
  });
}

}  // namespace kvxfer::kernels::cpu
