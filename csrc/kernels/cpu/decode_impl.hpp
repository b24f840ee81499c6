// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Decode attention: one query row per sequence against a stretch of its keys. Bound by memory: the
// next tile's rows are prefetched while this tile's are multiplied. Included per instruction set
// (isa_*.cpp).
#pragma once

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
                          Ahead<T>& ahead, int64_t stride, int64_t n) {
  constexpr int kKeys = kLanes / R;
  Vf acc[kLanes] = {};
  int64_t d = 0;
  for (; d + kLine<T> <= n; d += kLine<T>) {
    for (int t = 0; t < kKeys; ++t) ahead.ask(stride);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLine<T> / kLanes; ++i) {
      multiply_rows<R>(acc, q + d + i * kLanes, q_stride,
                       [&](int t) KVXFER_LAMBDA { return load_some(k[t] + shift + d, i); });
    }
  }
  for (; d + kLanes <= n; d += kLanes) {
    for (int t = 0; t < kKeys; ++t) ahead.ask(d % kLine<T> == 0 ? stride : 0);
    multiply_rows<R>(acc, q + d, q_stride,
                     [&](int t) KVXFER_LAMBDA { return load(k[t] + shift + d); });
  }
  if (d < n) {  // q is padded with zeros
    multiply_rows<R>(acc, q + d, q_stride,
                     [&](int t) KVXFER_LAMBDA { return load_part(k[t] + shift + d, n - d); });
  }
  return sum_lanes_of_each<kLanes>(acc);
}

// values[r][d..] += sum over keys of p[t][r] * v[t][d..], N vectors of channels at a time: by twos
// in the order of load_some, a last one as it lies.
template <int R, int N, class T>
KVXFER_INLINE void add_values(const float* p, const T* const* v, int64_t shift, Ahead<T>& ahead,
                              int64_t ahead_stride, int64_t count, float* values, int64_t stride) {
  Vf acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) acc[r][j] = load(values + r * stride + j * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t at = 0; at < N * kLanes; at += kLine<T>) ahead.ask(ahead_stride);
    Vf x[N];
    for (int j = 0; j < N; ++j) {
      x[j] = N % 2 == 0 ? load_some(v[t] + shift, j) : load(v[t] + shift + j * kLanes);
    }
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
void decode_tile(const Attention& a, const T* const* k_rows, const T* const* v_rows, int64_t count,
                 int64_t k_shift, int64_t v_shift, Ahead<T>& k_ahead, Ahead<T>& v_ahead,
                 const float* k_scales, const float* v_scales, const float* q, int64_t q_stride,
                 RowState& state, float* values, int64_t stride) {
  constexpr int kKeys = kLanes / R;
  alignas(64) float scores[R * kMostTile];
  // Short of a whole step the last key stands in: its scores are masked, and no foreign row is
  // read.
  const int64_t padded = (count + kKeys - 1) / kKeys * kKeys;
  for (int64_t t = 0; t < padded; t += kKeys) {
    const T* k[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) k[i] = k_rows[t + i < count ? t + i : count - 1];
    const Vf sums = dot_rows<R>(q, q_stride, k, k_shift, k_ahead,
                                k_ahead.stride(t / kKeys, kLine<T>), a.head_dim);
    store(scores + t * R, sums);
  }
  scale_keys<R>(scores, k_scales, count);
  soften<R>(a, scores, count, padded, state, values, stride);
  scale_keys<R>(scores, v_scales, count);
  constexpr int kWide = kLanes / R < 8 ? kLanes / R : 8;
  static_assert(!kEvenOdd<T> || kWide % 2 == 0);
  const int64_t n = a.head_dim_v;
  int64_t d = 0;
  const auto add = [&](auto vectors) KVXFER_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    add_values<R, kVectors>(scores, v_rows, v_shift + d, v_ahead,
                            d % kLine<T> == 0 ? v_ahead.stride(d / kLine<T>, kLine<T>) : 0, count,
                            values + d, stride);
    d += kVectors * kLanes;
  };
  while (d + kWide * kLanes <= n) add(std::integral_constant<int, kWide>{});
  if constexpr (kEvenOdd<T> && kWide > 2) {
    while (d + 2 * kLanes <= n) add(std::integral_constant<int, 2>{});
  }
  while (d + kLanes <= n) add(std::integral_constant<int, 1>{});
  if (d < n) {
    add_values_tail<R>(scores, v_rows, v_shift + d, count, n - d, values + d, stride);
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

// Query rows that go over a tile together: what is loaded and widened once serves them all, and 32
// registers hold the sums of 8.
constexpr int kMostRows = kLanes == 16 ? 8 : 4;

// A head's query rows in groups of kMostRows, then of half as many, down to 1:
// body(std::integral_constant, first row).
template <int R = kMostRows, class Body>
KVXFER_INLINE void for_row_groups(int64_t group, const Body& body, int64_t g = 0) {
  for (; g + R <= group; g += R) body(std::integral_constant<int, R>{}, g);
  if constexpr (R > 1) for_row_groups<R / 2>(group, body, g);
}

KVXFER_INLINE int64_t num_passes(int64_t group) {
  return group / kMostRows + __builtin_popcountll(static_cast<uint64_t>(group % kMostRows));
}

// A tile of one head.
struct Unit {
  int64_t kv_head, tile, size;
};

// What to ask for during a unit. Where the heads of a token lie together: of the next keys' whole
// rows, in their order, this head's share. Else the rows of the unit that comes next: more keys of
// this head, the next head, or the next keys.
template <class T>
KVXFER_INLINE Ahead<T> ahead_of(const RowStrides& strides, int64_t width, const DecodeItem& item,
                                const Unit& unit, const T* const* rows, int64_t count,
                                const T* const* next, int64_t passes) {
  const int64_t heads = item.head_end - item.head_begin, begin = item.head_begin * strides.head;
  const auto ahead = [&](const T* const* all, int64_t first, int64_t shift, int64_t at,
                         int64_t together) {
    return Ahead<T>{all + first, all + KeyRows<T>::kRoom - 1, shift, at, together, passes};
  };
  if (strides.head == width && heads > 1) {
    const int64_t together = heads * width;
    const int64_t first = (unit.kv_head - item.head_begin) * unit.size * width;
    return ahead(next, first / together, begin, first % together, together);
  }
  if (unit.tile + unit.size < count) {
    return ahead(rows, unit.tile + unit.size, unit.kv_head * strides.head, 0, width);
  }
  if (unit.kv_head + 1 < item.head_end) {
    return ahead(rows, 0, (unit.kv_head + 1) * strides.head, 0, width);
  }
  return ahead(next, 0, begin, 0, width);
}

// A head-major cache is walked as it lies: all keys of a block for one head, then for the next.
KVXFER_INLINE int64_t keys_together(const Attention& a, int64_t tile) {
  if (a.k.strides.head <= a.k.strides.token || a.block_size <= tile) return tile;
  const int64_t most = a.block_size < kMostKeys ? a.block_size : kMostKeys;
  return most / tile * tile;
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
    if constexpr (kEvenOdd<T>) order_even_odd<false>(q, a.head_dim);
    for (int64_t d = 0; d < v_stride; ++d) s.values[h * v_stride + d] = 0;
    s.state[h] = {splat(kLowest), Vf{}};
  }
  const int64_t passes = num_passes(group);
  const int64_t size = tile_of<T>(a), most = keys_together(a, size);
  const KeyRows<T> none(static_cast<const T*>(a.k.data), static_cast<const T*>(a.v.data));
  KeyRows<T> keys[2] = {none, none};
  const auto locate = [&](int64_t begin, KeyRows<T>& rows) {
    const int64_t end = begin + most < item.key_end ? begin + most : item.key_end;
    locate_rows(a, item.sequence, begin < end ? begin : end, end, rows);
  };
  locate(item.key_begin, keys[0]);
  for (int now = 0; keys[now].count > 0; now ^= 1) {
    const KeyRows<T>& rows = keys[now];
    KeyRows<T>& next = keys[now ^ 1];
    locate(rows.begin + rows.count, next);
    for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
      const int64_t k_shift = kv_head * a.k.strides.head, v_shift = kv_head * a.v.strides.head;
      for (int64_t tile = 0; tile < rows.count; tile += size) {
        const int64_t left = rows.count - tile, count = left < size ? left : size;
        const Unit unit{kv_head, tile, size};
        Ahead<T> k_ahead =
            ahead_of(a.k.strides, a.head_dim, item, unit, rows.k, rows.count, next.k, passes);
        Ahead<T> v_ahead =
            ahead_of(a.v.strides, a.head_dim_v, item, unit, rows.v, rows.count, next.v, passes);
        float k_buffer[kMostTile], v_buffer[kMostTile];
        const float* k_scales =
            load_scales(a, a.k_scales, item.sequence, rows.begin + tile, count, kv_head, k_buffer);
        const float* v_scales =
            load_scales(a, a.v_scales, item.sequence, rows.begin + tile, count, kv_head, v_buffer);
        for_row_groups(group, [&](auto rows_at_once, int64_t g) {
          constexpr int kRows = decltype(rows_at_once)::value;
          const int64_t h = (kv_head - item.head_begin) * group + g;
          decode_tile<kRows>(a, rows.k + tile, rows.v + tile, count, k_shift, v_shift, k_ahead,
                             v_ahead, k_scales, v_scales, s.q + h * q_stride, q_stride, s.state[h],
                             s.values + h * v_stride, v_stride);
          ++k_ahead.pass, ++v_ahead.pass;
        });
      }
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
        float* values = s.values + (h + r) * v_stride;
        if constexpr (kEvenOdd<T>) order_even_odd<true>(values, a.head_dim_v);
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
