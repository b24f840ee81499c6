// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Decode attention: one query row per sequence against a stretch of its keys. Bound by memory: the
// next tile's rows are prefetched while this tile's are multiplied. Included per instruction set
// (isa_*.cpp).
#pragma once

constexpr int64_t kDecodeTile = 32;  // keys

KVXFER_INLINE int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Addresses of a tile's rows for head 0, computed once for all heads.
template <class T>
struct TileRows {
  const T* k[kDecodeTile];
  const T* v[kDecodeTile];
  int64_t count;
};

template <class T>
KVXFER_INLINE void locate_rows(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                               TileRows<T>& rows) {
  const int32_t* table = a.block_table + sequence * a.table_stride;
  int64_t column = begin / a.block_size, offset = begin - column * a.block_size;
  rows.count = end - begin;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t block = table[column];
    rows.k[i] = static_cast<const T*>(a.k.data) + row_offset(a.k.strides, block, offset, 0);
    rows.v[i] = static_cast<const T*>(a.v.data) + row_offset(a.v.strides, block, offset, 0);
    if (++offset == a.block_size) offset = 0, ++column;
  }
  // Entries behind the last key are only ever prefetched.
  for (int64_t i = rows.count; i < kDecodeTile; ++i) {
    rows.k[i] = static_cast<const T*>(a.k.data);
    rows.v[i] = static_cast<const T*>(a.v.data);
  }
}

// The scales of `count` keys of one head into `out`, or null where the cache has none.
KVXFER_INLINE const float* load_scales(const Attention& a, const Scales& from, int64_t sequence,
                                       int64_t begin, int64_t count, int64_t head, float* out) {
  if (from.data == nullptr) return nullptr;
  const int32_t* table = a.block_table + sequence * a.table_stride;
  int64_t column = begin / a.block_size, offset = begin - column * a.block_size;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = from.data[row_offset(from.strides, table[column], offset, head)];
    if (++offset == a.block_size) offset = 0, ++column;
  }
  return out;
}

// scores[r][t..t+3] = q[r] . k[t..t+3] for R query rows and four keys. A line of the next tile's
// rows is asked for between the products: in bursts the requests would fill the core's few miss
// buffers, and the products would wait.
template <int R, bool kTail, bool kPrefetch, class T>
KVXFER_INLINE void dot_rows(const float* q, int64_t q_stride, const T* const* k,
                            const T* const* ahead, int64_t shift, int64_t n, float* scores) {
  constexpr int kPerLine = 64 / (kLanes * static_cast<int>(sizeof(T))) > 0
                               ? 64 / (kLanes * static_cast<int>(sizeof(T)))
                               : 1;  // steps that one line lasts
  Vf acc[R][4] = {};
  const T* k0 = k[0] + shift;
  const T* k1 = k[1] + shift;
  const T* k2 = k[2] + shift;
  const T* k3 = k[3] + shift;
  const T* next[4] = {ahead[0] + shift, ahead[1] + shift, ahead[2] + shift, ahead[3] + shift};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    if (kPrefetch) {
      const int64_t step = d / kLanes;
      if (kPerLine == 1) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(next[i] + d);
      } else if (kPerLine == 2) {
        const int64_t line = step / 2 * 2 * kLanes;
        __builtin_prefetch((step % 2 == 0 ? next[0] : next[2]) + line);
        __builtin_prefetch((step % 2 == 0 ? next[1] : next[3]) + line);
      } else {
        __builtin_prefetch(next[step % 4] + step / 4 * 4 * kLanes);
      }
    }
    const Vf x0 = load(k0 + d), x1 = load(k1 + d), x2 = load(k2 + d), x3 = load(k3 + d);
    for (int r = 0; r < R; ++r) {
      const Vf y = load(q + r * q_stride + d);
      acc[r][0] += x0 * y;
      acc[r][1] += x1 * y;
      acc[r][2] += x2 * y;
      acc[r][3] += x3 * y;
    }
  }
  if (kTail) {
    const Vf x0 = load_part(k0 + d, n - d), x1 = load_part(k1 + d, n - d);
    const Vf x2 = load_part(k2 + d, n - d), x3 = load_part(k3 + d, n - d);
    for (int r = 0; r < R; ++r) {
      const Vf y = load(q + r * q_stride + d);  // padded with zeros
      acc[r][0] += x0 * y;
      acc[r][1] += x1 * y;
      acc[r][2] += x2 * y;
      acc[r][3] += x3 * y;
    }
  }
  for (int r = 0; r < R; ++r) {
    const V4 sums = sum_each(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    __builtin_memcpy(scores + r * kDecodeTile, &sums, 16);
  }
}

// values[r][d..] += sum over keys of p[r][t] * v[t][d..], N vectors of channels at a time.
template <int R, int N, bool kPrefetch, class T>
KVXFER_INLINE void add_values(const float* p, const T* const* v, const T* const* ahead,
                              int64_t shift, int64_t count, float* values, int64_t stride) {
  Vf acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = load(values + r * stride + j * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    if (kPrefetch) {
      const char* next = reinterpret_cast<const char*>(ahead[t] + shift);
      for (int64_t at = 0; at < N * kLanes * static_cast<int64_t>(sizeof(T)); at += 64) {
        __builtin_prefetch(next + at);
      }
    }
    Vf x[N];
    for (int j = 0; j < N; ++j) x[j] = load(v[t] + shift + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vf w = splat(p[r * kDecodeTile + t]);
      for (int j = 0; j < N; ++j) acc[r][j] += w * x[j];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(values + r * stride + j * kLanes, acc[r][j]);
}

template <int R, class T>
KVXFER_INLINE void add_values_tail(const float* p, const T* const* v, int64_t shift, int64_t count,
                                   int64_t n, float* values, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const Vf x = load_part(v[t] + shift, n);
    for (int r = 0; r < R; ++r) {
      float* at = values + r * stride;
      store(at, load(at) + p[r * kDecodeTile + t] * x);  // rows are padded to whole vectors
    }
  }
}

// What a query row accumulates. The maximum is in base 2 and kept finite: exp2(-inf - -inf) would
// be NaN.
struct RowState {
  float highest;
  Vf sums;  // per lane, added up at the end
};
constexpr float kLowest = -1e30f;

template <int R>
KVXFER_INLINE void soften(const Attention& a, float* scores, int64_t count, RowState* state,
                          float* values, int64_t stride) {
  const float cap_log2 = a.logits_soft_cap * 1.44269504088896341f;
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kDecodeTile;
    if (cap_log2 > 0) {
      for (int64_t t = 0; t < kDecodeTile; t += kLanes)
        store(row + t, soft_cap(load(row + t), cap_log2));
    }
    for (int64_t t = count; t < kDecodeTile; ++t) row[t] = -__builtin_inff();
    Vf highest = splat(kLowest);
    for (int64_t t = 0; t < kDecodeTile; t += kLanes) {
      highest = max_or_second(load(row + t), highest);
    }
    const float new_highest = max_lanes(highest);
    if (new_highest > state[r].highest) {
      const float shrink = exp2_fast(splat(state[r].highest - new_highest))[0];
      state[r].highest = new_highest;
      state[r].sums *= shrink;
      for (int64_t d = 0; d < stride; d += kLanes) {
        store(values + r * stride + d, load(values + r * stride + d) * shrink);
      }
    }
    for (int64_t t = 0; t < kDecodeTile; t += kLanes) {
      const Vf weight = exp2_fast(load(row + t) - state[r].highest);
      state[r].sums += weight;
      store(row + t, weight);
    }
  }
}

template <int R>
KVXFER_INLINE void scale_keys(float* scores, const float* scales, int64_t count) {
  if (scales == nullptr) return;
  for (int r = 0; r < R; ++r)
    for (int64_t t = 0; t < count; ++t) scores[r * kDecodeTile + t] *= scales[t];
}

// One tile of keys for R query rows of one KV head. The first rows of a group to see it prefetch
// the next tile.
template <int R, bool kTail, bool kPrefetch, class T>
void decode_tile(const Attention& a, const TileRows<T>& rows, const TileRows<T>& next,
                 int64_t k_shift, int64_t v_shift, const float* k_scales, const float* v_scales,
                 const float* q, int64_t q_stride, RowState* state, float* values, int64_t stride) {
  alignas(64) float scores[R * kDecodeTile];
  for (int64_t t = 0; t < rows.count; t += 4) {
    // Short of four keys the last one stands in: its scores are masked, and no foreign row is read.
    const T* k[4];
    for (int64_t i = 0; i < 4; ++i) k[i] = rows.k[t + i < rows.count ? t + i : rows.count - 1];
    dot_rows<R, kTail, kPrefetch>(q, q_stride, k, next.k + t, k_shift, a.head_dim, scores + t);
  }
  for (int64_t t = (rows.count + 3) / 4 * 4; t < kDecodeTile; ++t) {
    for (int r = 0; r < R; ++r) scores[r * kDecodeTile + t] = 0;
  }
  scale_keys<R>(scores, k_scales, rows.count);
  soften<R>(a, scores, rows.count, state, values, stride);
  scale_keys<R>(scores, v_scales, rows.count);
  constexpr int kWide = R >= 4 ? 2 : R == 2 ? 4 : 8;
  int64_t d = 0;
  for (; d + kWide * kLanes <= a.head_dim_v; d += kWide * kLanes) {
    add_values<R, kWide, kPrefetch>(scores, rows.v, next.v, v_shift + d, rows.count, values + d,
                                    stride);
  }
  for (; d + kLanes <= a.head_dim_v; d += kLanes) {
    add_values<R, 1, kPrefetch>(scores, rows.v, next.v, v_shift + d, rows.count, values + d,
                                stride);
  }
  if (d < a.head_dim_v) {
    add_values_tail<R>(scores, rows.v, v_shift + d, rows.count, a.head_dim_v - d, values + d,
                       stride);
  }
}

struct DecodeScratch {
  float* q;       // [heads][q_stride], scaled
  float* values;  // [heads][v_stride]
  RowState* state;
};

KVXFER_INLINE DecodeScratch carve(const Attention& a, void* scratch) {
  float* q = static_cast<float*>(scratch);
  float* values = q + a.num_q_heads * pad_lanes(a.head_dim);
  RowState* state = reinterpret_cast<RowState*>(values + a.num_q_heads * pad_lanes(a.head_dim_v));
  return {q, values, state};
}

int64_t decode_scratch(const Attention& a) {
  return a.num_q_heads * ((pad_lanes(a.head_dim) + pad_lanes(a.head_dim_v)) * 4 +
                          static_cast<int64_t>(sizeof(RowState)));
}

// The factor that q takes so that scores come out in base 2 (with a cap: as soft_cap wants them).
KVXFER_INLINE float query_scale(const Attention& a) {
  constexpr float kLog2E = 1.44269504088896341f;
  return a.logits_soft_cap > 0 ? a.sm_scale * 2 * kLog2E / a.logits_soft_cap : a.sm_scale * kLog2E;
}

template <class T>
void decode_typed(const Attention& a, const DecodeItem& item, void* scratch) {
  const DecodeScratch s = carve(a, scratch);
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  const int64_t q_stride = pad_lanes(a.head_dim), v_stride = pad_lanes(a.head_dim_v);
  const int64_t first = item.head_begin * group, heads = (item.head_end - item.head_begin) * group;
  const float scale = query_scale(a);
  for (int64_t h = 0; h < heads; ++h) {
    float* q = s.q + h * q_stride;
    for (int64_t d = a.head_dim; d < q_stride; ++d) q[d] = 0;
    convert(row_of(a.q, item.row, first + h), a.q.dtype, q, DType::kFloat32, a.head_dim, scale,
            1.0f);
    for (int64_t d = 0; d < v_stride; ++d) s.values[h * v_stride + d] = 0;
    s.state[h] = {kLowest, Vf{}};
  }
  const bool tail = a.head_dim % kLanes != 0;
  TileRows<T> tiles[2];
  const auto tile_end = [&](int64_t begin) {
    return begin + kDecodeTile < item.key_end ? begin + kDecodeTile : item.key_end;
  };
  locate_rows(a, item.sequence, item.key_begin, tile_end(item.key_begin), tiles[0]);
  int now = 0;
  for (int64_t begin = item.key_begin; begin < item.key_end; begin = tile_end(begin), now ^= 1) {
    const TileRows<T>& rows = tiles[now];
    TileRows<T>& next = tiles[now ^ 1];
    locate_rows(a, item.sequence, tile_end(begin), tile_end(tile_end(begin)), next);
    for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
      const int64_t k_shift = kv_head * a.k.strides.head, v_shift = kv_head * a.v.strides.head;
      float k_buffer[kDecodeTile], v_buffer[kDecodeTile];
      const float* k_scales =
          load_scales(a, a.k_scales, item.sequence, begin, rows.count, kv_head, k_buffer);
      const float* v_scales =
          load_scales(a, a.v_scales, item.sequence, begin, rows.count, kv_head, v_buffer);
      for (int64_t g = 0; g < group;) {
        const int64_t h = (kv_head - item.head_begin) * group + g;
        const float* q = s.q + h * q_stride;
        float* values = s.values + h * v_stride;
        const auto run = [&](auto rows_at_once) {
          constexpr int kRows = decltype(rows_at_once)::value;
          const auto tile = tail ? (g == 0 ? &decode_tile<kRows, true, true, T>
                                           : &decode_tile<kRows, true, false, T>)
                                 : (g == 0 ? &decode_tile<kRows, false, true, T>
                                           : &decode_tile<kRows, false, false, T>);
          tile(a, rows, next, k_shift, v_shift, k_scales, v_scales, q, q_stride, s.state + h,
               values, v_stride);
          g += kRows;
        };
        if (group - g >= kMaxDecodeRows) {
          run(std::integral_constant<int, kMaxDecodeRows>{});
        } else if (group - g >= 2) {
          run(std::integral_constant<int, 2>{});
        } else {
          run(std::integral_constant<int, 1>{});
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* partial = item.partial + h * partial_stride(a.head_dim_v);
    partial[0] = s.state[h].highest;
    partial[1] = sum_lanes(s.state[h].sums);
    for (int64_t d = 0; d < a.head_dim_v; ++d) partial[2 + d] = s.values[h * v_stride + d];
  }
}

void decode(const Attention& a, const DecodeItem& item, void* scratch) {
  switch (a.k.dtype) {
    case DType::kFloat32:
      return decode_typed<float>(a, item, scratch);
    case DType::kFloat16:
      return decode_typed<Half>(a, item, scratch);
    case DType::kBFloat16:
      return decode_typed<BFloat>(a, item, scratch);
    case DType::kFloat8E4M3:
      return decode_typed<E4M3>(a, item, scratch);
    case DType::kFloat8E5M2:
      return decode_typed<E5M2>(a, item, scratch);
    case DType::kInt8:
      return decode_typed<Int8>(a, item, scratch);
  }
}

// Divides by the sum, the sink's share included, and writes one row of out and lse.
KVXFER_INLINE void write_row(const Attention& a, int64_t row, int64_t q_head, float highest,
                             float sum, float* values) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
  float base = highest;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[q_head] * kLog2E;
    base = sink > highest ? sink : highest;
    const float shrink = scalar_exp2(highest - base);
    sum = sum * shrink + scalar_exp2(sink - base);
    for (int64_t d = 0; d < a.head_dim_v; ++d) values[d] *= shrink;
  }
  const float factor = sum == 0 ? 0.0f : a.v_scale / sum;
  for (int64_t d = 0; d < a.head_dim_v; ++d) values[d] *= factor;
  convert(values, DType::kFloat32, row_of_mut(a.out, row, q_head), a.out.dtype, a.head_dim_v, 1.0f,
          1.0f);
  if (a.lse != nullptr) {
    a.lse[row * a.lse_stride + q_head] =
        sum == 0 ? -__builtin_inff() : base * kLn2 + __builtin_logf(sum);
  }
}

void finish(const Attention& a, int64_t row, int64_t q_head, const float* partials,
            int64_t num_partials, int64_t distance, void* scratch) {
  float* values = static_cast<float*>(scratch);
  float highest = kLowest, sum = 0;
  for (int64_t i = 0; i < num_partials; ++i) {
    const float each = partials[i * distance];
    highest = each > highest ? each : highest;
  }
  for (int64_t d = 0; d < a.head_dim_v; ++d) values[d] = 0;
  for (int64_t i = 0; i < num_partials; ++i) {  // in order, so that the sum is always the same
    const float* partial = partials + i * distance;
    const float weight = scalar_exp2(partial[0] - highest);
    sum += weight * partial[1];
    for (int64_t d = 0; d < a.head_dim_v; ++d) values[d] += weight * partial[2 + d];
  }
  write_row(a, row, q_head, highest, sum, values);
}
