// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Decode attention: one query row per sequence against a stretch of its keys. Bound by memory: the
// next tile's rows are prefetched while this tile's are multiplied. Included per instruction set
// (isa_*.cpp).
#pragma once

// Keys: as few as a step takes (one query row, as many keys as lanes). Two tiles of keys and values
// of a head, this one and the next, must fit into the core's nearest cache, whose sets a
// token-major cache uses unevenly: with 32 keys of float32 the lines asked for were gone before
// their turn.
constexpr int64_t kDecodeTile = kLanes > 8 ? kLanes : 8;

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

// Rows of the unit (tile and head) that comes next: while this one's rows are multiplied, the lines
// of those are asked for, one here and one there. In bursts the requests would fill the core's few
// miss buffers, and the products would wait. A head with more query rows than fit at once goes over
// its tile in several passes, each of which asks for its share.
template <class T>
struct Ahead {
  const T* const* rows;
  int64_t shift;
  int64_t pass, passes;

  KVXFER_INLINE bool asks(int64_t step) const { return passes == 1 || step % passes == pass; }
};

template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // channels per cache line

// Adds x[t] * q[r] for R query rows and kLanes / R keys, one vector of channels of each.
template <int R, class Load>
KVXFER_INLINE void multiply_rows(Vf (&acc)[kLanes], const float* q, int64_t q_stride,
                                 const Load& key) {
  constexpr int kKeys = kLanes / R;
  Vf x[kKeys];
  for (int t = 0; t < kKeys; ++t) x[t] = key(t);
  for (int r = 0; r < R; ++r) {
    const Vf y = load(q + r * q_stride);
    for (int t = 0; t < kKeys; ++t) acc[t * R + r] += x[t] * y;
  }
}

// The scores of kLanes / R keys and R query rows, [key][row]. As many accumulators as a vector has
// lanes, so that one transposed sum ends them all: a sum across lanes per score would cost more
// than the products.
template <int R, class T>
KVXFER_INLINE Vf dot_rows(const float* q, int64_t q_stride, const T* const* k, int64_t shift,
                          const T* const* next, int64_t next_shift, int64_t n) {
  constexpr int kKeys = kLanes / R;
  Vf acc[kLanes] = {};
  int64_t d = 0;
  for (; d + kLine<T> <= n; d += kLine<T>) {
    for (int t = 0; t < kKeys; ++t) __builtin_prefetch(next[t] + next_shift + d);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLine<T>; i += kLanes) {
      multiply_rows<R>(acc, q + d + i, q_stride,
                       [&](int t) KVXFER_LAMBDA { return load(k[t] + shift + d + i); });
    }
  }
  for (; d + kLanes <= n; d += kLanes) {
    for (int t = 0; t < kKeys; ++t) __builtin_prefetch(next[t] + next_shift + d);
    multiply_rows<R>(acc, q + d, q_stride,
                     [&](int t) KVXFER_LAMBDA { return load(k[t] + shift + d); });
  }
  if (d < n) {  // q is padded with zeros
    multiply_rows<R>(acc, q + d, q_stride,
                     [&](int t) KVXFER_LAMBDA { return load_part(k[t] + shift + d, n - d); });
  }
  return sum_lanes_of_each<kLanes>(acc);
}

// values[r][d..] += sum over keys of p[t][r] * v[t][d..], N vectors of channels at a time.
template <int R, int N, class T>
KVXFER_INLINE void add_values(const float* p, const T* const* v, int64_t shift,
                              const T* const* next, int64_t next_shift, int64_t count,
                              float* values, int64_t stride) {
  Vf acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = load(values + r * stride + j * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t at = 0; at < N * kLanes; at += kLine<T>) {
      __builtin_prefetch(next[t] + next_shift + at);
    }
    Vf x[N];
    for (int j = 0; j < N; ++j) x[j] = load(v[t] + shift + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vf w = splat(p[t * R + r]);
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
      store(at, load(at) + p[t * R + r] * x);  // rows are padded to whole vectors
    }
  }
}

// What R query rows accumulate, lane i for row i % R. The maximum is in base 2 and kept finite:
// exp2(-inf - -inf) would be NaN.
struct RowState {
  Vf highest;
  Vf sums;  // added up over the lanes of a row at the end
};
constexpr float kLowest = -1e30f;

// Scores [key][row] become weights; `padded` keys, those from `count` on weigh nothing.
template <int R>
KVXFER_INLINE void soften(const Attention& a, float* scores, int64_t count, int64_t padded,
                          RowState& state, float* values, int64_t stride) {
  const float cap_log2 = a.logits_soft_cap * 1.44269504088896341f;
  const int64_t n = padded * R;
  if (cap_log2 > 0) {
    for (int64_t i = 0; i < n; i += kLanes) store(scores + i, soft_cap(load(scores + i), cap_log2));
  }
  for (int64_t i = count * R; i < n; ++i) scores[i] = -__builtin_inff();
  Vf highest = splat(kLowest);
  for (int64_t i = 0; i < n; i += kLanes) highest = max_or_second(load(scores + i), highest);
  highest = max_or_second(state.highest, max_of_each<R>(highest));
  if (!all_equal(highest, state.highest)) {
    const Vf shrink = exp2_fast(state.highest - highest);
    state.highest = highest;
    state.sums *= shrink;
    for (int r = 0; r < R; ++r) {
      for (int64_t d = 0; d < stride; d += kLanes) {
        store(values + r * stride + d, load(values + r * stride + d) * shrink[r]);
      }
    }
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vf weight = exp2_fast(load(scores + i) - highest);
    state.sums += weight;
    store(scores + i, weight);
  }
}

template <int R>
KVXFER_INLINE void scale_keys(float* scores, const float* scales, int64_t count) {
  if (scales == nullptr) return;
  for (int64_t t = 0; t < count; ++t)
    for (int r = 0; r < R; ++r) scores[t * R + r] *= scales[t];
}

// One tile of keys for R query rows of one KV head.
template <int R, class T>
void decode_tile(const Attention& a, const TileRows<T>& rows, int64_t k_shift, int64_t v_shift,
                 Ahead<T> k_ahead, Ahead<T> v_ahead, const float* k_scales, const float* v_scales,
                 const float* q, int64_t q_stride, RowState& state, float* values, int64_t stride) {
  constexpr int kKeys = kLanes / R;
  alignas(64) float scores[R * kDecodeTile];
  // Short of a whole step the last key stands in: its scores are masked, and no foreign row is
  // read.
  const int64_t padded = (rows.count + kKeys - 1) / kKeys * kKeys;
  for (int64_t t = 0; t < padded; t += kKeys) {
    const T* k[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) k[i] = rows.k[t + i < rows.count ? t + i : rows.count - 1];
    // What need not be asked for is asked for where it is: that costs less than a second loop.
    const bool ask = k_ahead.asks(t / kKeys);
    const Vf sums = dot_rows<R>(q, q_stride, k, k_shift, ask ? k_ahead.rows + t : k,
                                ask ? k_ahead.shift : k_shift, a.head_dim);
    store(scores + t * R, sums);
  }
  scale_keys<R>(scores, k_scales, rows.count);
  soften<R>(a, scores, rows.count, padded, state, values, stride);
  scale_keys<R>(scores, v_scales, rows.count);
  constexpr int kWide = R >= 4 ? kLanes / 4 : kLanes / R < 8 ? kLanes / R : 8;
  const int64_t n = a.head_dim_v;
  int64_t d = 0;
  const auto add = [&](auto vectors) KVXFER_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    const bool ask = v_ahead.asks(d / kLine<T>);
    add_values<R, kVectors>(scores, rows.v, v_shift + d, ask ? v_ahead.rows : rows.v,
                            (ask ? v_ahead.shift : v_shift) + d, rows.count, values + d, stride);
    d += kVectors * kLanes;
  };
  while (d + kWide * kLanes <= n) add(std::integral_constant<int, kWide>{});
  while (d + kLanes <= n) add(std::integral_constant<int, 1>{});
  if (d < n) {
    add_values_tail<R>(scores, rows.v, v_shift + d, rows.count, n - d, values + d, stride);
  }
}

struct DecodeScratch {
  float* q;         // [heads][q_stride], scaled
  float* values;    // [heads][v_stride]
  RowState* state;  // [heads]: of a group of rows, at its first one
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

// A head's query rows in groups of 4, then 2, then 1: body(std::integral_constant, first row).
template <class Body>
KVXFER_INLINE void for_row_groups(int64_t group, const Body& body) {
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) body(std::integral_constant<int, 4>{}, g);
  if (g + 2 <= group) body(std::integral_constant<int, 2>{}, g), g += 2;
  if (g < group) body(std::integral_constant<int, 1>{}, g);
}

KVXFER_INLINE int64_t num_passes(int64_t group) { return group / 4 + (group % 4 >= 2) + group % 2; }

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
    s.state[h] = {splat(kLowest), Vf{}};
  }
  const int64_t passes = num_passes(group);
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
      const bool last = kv_head + 1 == item.head_end;
      const TileRows<T>& later = last ? next : rows;
      const int64_t later_head = last ? item.head_begin : kv_head + 1;
      Ahead<T> k_ahead{later.k, later_head * a.k.strides.head, 0, passes};
      Ahead<T> v_ahead{later.v, later_head * a.v.strides.head, 0, passes};
      float k_buffer[kDecodeTile], v_buffer[kDecodeTile];
      const float* k_scales =
          load_scales(a, a.k_scales, item.sequence, begin, rows.count, kv_head, k_buffer);
      const float* v_scales =
          load_scales(a, a.v_scales, item.sequence, begin, rows.count, kv_head, v_buffer);
      for_row_groups(group, [&](auto rows_at_once, int64_t g) {
        constexpr int kRows = decltype(rows_at_once)::value;
        const int64_t h = (kv_head - item.head_begin) * group + g;
        decode_tile<kRows>(a, rows, k_shift, v_shift, k_ahead, v_ahead, k_scales, v_scales,
                           s.q + h * q_stride, q_stride, s.state[h], s.values + h * v_stride,
                           v_stride);
        ++k_ahead.pass, ++v_ahead.pass;
      });
    }
  }
  for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
    for_row_groups(group, [&](auto rows_at_once, int64_t g) {
      constexpr int kRows = decltype(rows_at_once)::value;
      const int64_t h = (kv_head - item.head_begin) * group + g;
      for (int r = 0; r < kRows; ++r) {
        float* partial = item.partial + (h + r) * partial_stride(a.head_dim_v);
        partial[0] = s.state[h].highest[r];
        partial[1] = 0;
        for (int i = r; i < kLanes; i += kRows) partial[1] += s.state[h].sums[i];
        const float* values = s.values + (h + r) * v_stride;
        for (int64_t d = 0; d < a.head_dim_v; ++d) partial[2 + d] = values[d];
      }
    });
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
