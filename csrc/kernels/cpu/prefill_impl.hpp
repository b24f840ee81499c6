// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Prefill attention: kTileRows query rows of one KV head against all their keys, tile by tile.
// Bound by arithmetic.
//
// Everything is transposed: a vector holds query rows, so K and V enter as broadcast scalars in the
// order in which they lie in the cache, the softmax needs no sums across lanes, and masks are
// comparisons of vectors of positions. The group's heads are rows like any other and so share each
// K and V tile. Included per instruction set.
#pragma once

constexpr int kPanelVectors = 3;
constexpr int64_t kPanel = kPanelVectors * kLanes;  // query rows in one panel
constexpr int64_t kPanels = kTileRows / kPanel;
static_assert(kTileRows % kPanel == 0);

KVXFER_INLINE int64_t pad_keys(int64_t n) { return (n + kBroadcast - 1) / kBroadcast * kBroadcast; }

struct PrefillScratch {
  float* q;            // [kPanels][head_dim][kPanel], scaled
  float* values;       // [kPanels][pad(head_dim_v)][kPanel]
  float* scores;       // [kTileKeys][kPanel]
  float* k;            // [kTileKeys][head_dim]
  float* v;            // [kTileKeys][pad(head_dim_v)]
  float* highest;      // [kTileRows]
  float* sums;         // [kTileRows]
  int32_t* positions;  // [kTileRows]
  float* row;          // [head_dim or head_dim_v]
};

KVXFER_INLINE PrefillScratch carve_prefill(const Attention& a, void* scratch, int64_t* nbytes) {
  char* base = static_cast<char*>(scratch);
  int64_t at = 0;
  const auto take = [&](int64_t n) {
    char* p = base + at;
    at += (n * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(p);
  };
  PrefillScratch s{};
  const int64_t dv = pad_keys(a.head_dim_v);
  s.q = take(kTileRows * a.head_dim);
  s.values = take(kTileRows * dv);
  s.scores = take(kTileKeys * kPanel);
  s.k = take(kTileKeys * a.head_dim);
  s.v = take(kTileKeys * dv);
  s.highest = take(kTileRows);
  s.sums = take(kTileRows);
  s.positions = reinterpret_cast<int32_t*>(take(kTileRows));
  s.row = take(a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v);
  *nbytes = at;
  return s;
}

int64_t prefill_scratch(const Attention& a) {
  int64_t nbytes = 0;
  alignas(64) static char nothing[64];
  carve_prefill(a, nothing, &nbytes);
  return nbytes;
}

// out[i][panel] (+)= sum over n of a_i[n] * b[n][panel], for kBroadcast rows i. The inner loop of
// both products.
template <bool kAccumulate>
KVXFER_INLINE void multiply_panel(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                  int64_t n, float* out) {
  Vf acc[kBroadcast][kPanelVectors];
  for (int i = 0; i < kBroadcast; ++i)
    for (int j = 0; j < kPanelVectors; ++j)
      acc[i][j] = kAccumulate ? load(out + i * kPanel + j * kLanes) : Vf{};
  for (int64_t step = 0; step < n; ++step) {
    Vf x[kPanelVectors];
    for (int j = 0; j < kPanelVectors; ++j) x[j] = load(b + step * kPanel + j * kLanes);
    for (int i = 0; i < kBroadcast; ++i) {
      const Vf y = splat(a[i * a_row + step * a_step]);
      for (int j = 0; j < kPanelVectors; ++j) acc[i][j] += y * x[j];
    }
  }
  for (int i = 0; i < kBroadcast; ++i)
    for (int j = 0; j < kPanelVectors; ++j) store(out + i * kPanel + j * kLanes, acc[i][j]);
}

// Which keys the query rows at these positions may not see.
struct Sight {
  Vi position, oldest;
  bool causal;

  KVXFER_INLINE Sight(const Attention& a, const int32_t* positions)
      : position(*reinterpret_cast<const ViLoose*>(positions)), causal(a.causal) {
    const int64_t most = 1 << 30;
    const int64_t reach = a.window_left < 0 || a.window_left > most ? most : a.window_left;
    oldest = position - static_cast<int32_t>(reach);
  }
  KVXFER_INLINE Vi hides(int64_t at) const {
    const Vi key = Vi{} + static_cast<int32_t>(at);
    Vi hidden = key < oldest;
    if (causal) hidden |= key > position;
    return hidden;
  }
};

// Keys outside what a row may see get -inf. Only tiles that a mask's edge crosses come here.
KVXFER_INLINE void mask_panel(const Attention& a, int64_t key_begin, int64_t count,
                              const int32_t* positions, float* scores) {
  for (int j = 0; j < kPanelVectors; ++j) {
    const Sight sight(a, positions + j * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      float* at = scores + t * kPanel + j * kLanes;
      store(at, sight.hides(key_begin + t) ? splat(-__builtin_inff()) : load(at));
    }
  }
}

KVXFER_INLINE bool all_finite(const float* values, int64_t n) {
  constexpr int64_t kSums = 4;  // one alone would wait for itself
  Vf zeros[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int64_t j = 0; j < kSums; ++j) zeros[j] += load(values + i + j * kLanes) * 0.0f;
  for (; i < n; i += kLanes)
    zeros[0] += load_part(values + i, n - i < kLanes ? n - i : kLanes) * 0.0f;
  // A NaN or an infinity times 0 is NaN, and equals nothing.
  return all_equal((zeros[0] + zeros[1]) + (zeros[2] + zeros[3]), Vf{});
}

// multiply_panel<true> over the values of a tile that a mask's edge crosses and that hold a NaN or
// an infinity: there a weight of 0 does not suffice, and keys that a row may not see are left out.
// No attempt at speed: finite values do not come here, and their sums are the same in both.
void add_seen_values(const Attention& a, int64_t key_begin, int64_t count, const int32_t* positions,
                     const float* v, int64_t v_row, const float* weights, float* values) {
  for (int j = 0; j < kPanelVectors; ++j) {
    const Sight sight(a, positions + j * kLanes);
    for (int64_t d = 0; d < a.head_dim_v; ++d) {
      Vf acc = load(values + d * kPanel + j * kLanes);
      for (int64_t t = 0; t < count; ++t) {
        const Vf more = acc + splat(v[t * v_row + d]) * load(weights + t * kPanel + j * kLanes);
        acc = sight.hides(key_begin + t) ? acc : more;
      }
      store(values + d * kPanel + j * kLanes, acc);
    }
  }
}

// Scores become weights; the running maximum, sums and values of the panel follow.
KVXFER_INLINE void soften_panel(float* scores, int64_t count, float* highest, float* sums,
                                float* values, int64_t num_values) {
  Vf shrink[kPanelVectors];
  bool moved = false;
  for (int j = 0; j < kPanelVectors; ++j) {
    const Vf old = load(highest + j * kLanes);
    Vf top0 = old, top1 = old;
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      top0 = max_or_second(load(scores + t * kPanel + j * kLanes), top0);
      top1 = max_or_second(load(scores + (t + 1) * kPanel + j * kLanes), top1);
    }
    if (t < count) top0 = max_or_second(load(scores + t * kPanel + j * kLanes), top0);
    const Vf top = max_or_second(top0, top1);
    Vf sum{};
    for (t = 0; t < count; ++t) {
      float* at = scores + t * kPanel + j * kLanes;
      const Vf weight = exp2_fast(load(at) - top);
      sum += weight;
      store(at, weight);
    }
    shrink[j] = exp2_fast(old - top);
    moved = moved || !all_equal(old, top);
    store(highest + j * kLanes, top);
    store(sums + j * kLanes, load(sums + j * kLanes) * shrink[j] + sum);
  }
  if (!moved) return;
  for (int64_t d = 0; d < num_values; ++d) {
    for (int j = 0; j < kPanelVectors; ++j) {
      float* at = values + d * kPanel + j * kLanes;
      store(at, load(at) * shrink[j]);
    }
  }
}

// Rows of the tile as contiguous float, zeros behind the last key and the last channel: never NaN
// from a slot that nobody wrote, since 0 * NaN would pass on into the sum.
template <class T>
KVXFER_INLINE void gather_tile(const T* const* rows, int64_t shift, int64_t count, int64_t n,
                               int64_t padded, const float* scales, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    convert_row(rows[t] + shift, out + t * padded, n, scales == nullptr ? 1.0f : scales[t], 1.0f);
    for (int64_t d = n; d < padded; ++d) out[t * padded + d] = 0;
  }
  for (int64_t i = count * padded; i < pad_keys(count) * padded; ++i) out[i] = 0;
}

template <class T>
KVXFER_INLINE void prefetch_row(const T* p, int64_t n) {
  const char* at = reinterpret_cast<const char*>(p);
  const char* const end = at + n * static_cast<int64_t>(sizeof(T));
  for (; at + 256 <= end; at += 256) {
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
    __builtin_prefetch(at + 128);
    __builtin_prefetch(at + 192);
  }
  for (; at < end; at += 64) __builtin_prefetch(at);
}

template <class T>
KVXFER_INLINE void locate_tile(const Attention& a, int64_t sequence, int64_t begin, int64_t count,
                               const T** k, const T** v) {
  const int32_t* table = a.block_table + sequence * a.table_stride;
  int64_t column = begin / a.block_size, offset = begin - column * a.block_size;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = table[column];
    k[i] = static_cast<const T*>(a.k.data) + row_offset(a.k.strides, block, offset, 0);
    v[i] = static_cast<const T*>(a.v.data) + row_offset(a.v.strides, block, offset, 0);
    if (++offset == a.block_size) offset = 0, ++column;
  }
}

KVXFER_INLINE void load_queries(const Attention& a, const PrefillItem& item, int64_t first_position,
                                int64_t first_row, int64_t group, const PrefillScratch& s) {
  const float scale = query_scale(a);
  const int64_t rows = item.row_end - item.row_begin;
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    float* q = s.q + lane / kPanel * kPanel * a.head_dim + lane % kPanel;
    // Lanes behind the last row repeat its position, so that they widen no mask.
    const int64_t row = item.row_begin + (lane < rows ? lane : rows - 1);
    s.positions[lane] = static_cast<int32_t>(first_position + row / group);
    s.highest[lane] = kLowest;
    s.sums[lane] = 0;
    if (lane >= rows) {
      for (int64_t d = 0; d < a.head_dim; ++d) q[d * kPanel] = 0;
      continue;
    }
    const int64_t head = item.kv_head * group + row % group;
    convert(row_of(a.q, first_row + row / group, head), a.q.dtype, s.row, DType::kFloat32,
            a.head_dim, scale, 1.0f);
    for (int64_t d = 0; d < a.head_dim; ++d) q[d * kPanel] = s.row[d];
  }
}

template <class T>
void prefill_typed(const Attention& a, const PrefillItem& item, void* scratch) {
  int64_t unused;
  const PrefillScratch s = carve_prefill(a, scratch, &unused);
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  const int64_t first_row = a.cu_seqlens_q[item.sequence];
  const int64_t num_new = a.cu_seqlens_q[item.sequence + 1] - first_row;
  const int64_t length = a.seq_lens[item.sequence], first_position = length - num_new;
  const int64_t dv = pad_keys(a.head_dim_v);
  const float cap_log2 = a.logits_soft_cap * 1.44269504088896341f;
  load_queries(a, item, first_position, first_row, group, s);
  for (int64_t i = 0; i < kTileRows * dv; ++i) s.values[i] = 0;

  const int64_t lowest = first_position + item.row_begin / group;
  const int64_t highest = first_position + (item.row_end - 1) / group;
  const int64_t keys_end = a.causal ? highest + 1 : length;
  // Tiles start at multiples of kTileKeys, wherever the chunk or the window starts: same sums, same
  // result.
  const int64_t keys_begin = window_begin(lowest, a.window_left);
  const int64_t panels = ceil_div(item.row_end - item.row_begin, kPanel);
  const T *k_rows[2][kTileKeys], *v_rows[2][kTileKeys];
  const int64_t k_shift = item.kv_head * a.k.strides.head,
                v_shift = item.kv_head * a.v.strides.head;
  const auto tile_count = [&](int64_t begin) {
    const int64_t end = begin / kTileKeys * kTileKeys + kTileKeys;
    return (end < keys_end ? end : keys_end) - begin;
  };
  int now = 0;
  locate_tile(a, item.sequence, keys_begin, tile_count(keys_begin), k_rows[0], v_rows[0]);
  for (int64_t begin = keys_begin, count; begin < keys_end; begin += count, now ^= 1) {
    count = tile_count(begin);
    float scales[kTileKeys];
    const auto scales_of = [&](const Scales& from) {
      return load_scales(a, from, item.sequence, begin, count, item.kv_head, scales);
    };
    gather_tile(k_rows[now], k_shift, count, a.head_dim, a.head_dim, scales_of(a.k_scales), s.k);
    gather_tile(v_rows[now], v_shift, count, a.head_dim_v, dv, scales_of(a.v_scales), s.v);
    const int64_t next_count = begin + count < keys_end ? tile_count(begin + count) : 0;
    locate_tile(a, item.sequence, begin + count, next_count, k_rows[now ^ 1], v_rows[now ^ 1]);
    const auto crosses = [&](int64_t low, int64_t high) {  // a mask's edge, for rows up to `high`
      return (a.causal && begin + count - 1 > low) || begin < window_begin(high, a.window_left);
    };
    const bool strange = crosses(lowest, highest) && !all_finite(s.v, count * dv);
    int64_t ahead = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      // The next tile's rows come in while this one is multiplied.
      for (const int64_t until = next_count * (panel + 1) / panels; ahead < until; ++ahead) {
        prefetch_row(k_rows[now ^ 1][ahead] + k_shift, a.head_dim);
        prefetch_row(v_rows[now ^ 1][ahead] + v_shift, a.head_dim_v);
      }
      const int32_t* positions = s.positions + panel * kPanel;
      const int64_t panel_low = positions[0], panel_high = positions[kPanel - 1];
      if (a.causal && begin > panel_high) continue;
      if (begin + count <= window_begin(panel_low, a.window_left)) continue;
      const float* q = s.q + panel * kPanel * a.head_dim;
      float* values = s.values + panel * kPanel * dv;
      for (int64_t t = 0; t < count; t += kBroadcast) {
        multiply_panel<false>(s.k + t * a.head_dim, a.head_dim, 1, q, a.head_dim,
                              s.scores + t * kPanel);
      }
      if (cap_log2 > 0) {
        for (int64_t i = 0; i < count * kPanel; i += kLanes) {
          store(s.scores + i, soft_cap(load(s.scores + i), cap_log2));
        }
      }
      const bool masked = crosses(panel_low, panel_high);
      if (masked) mask_panel(a, begin, count, positions, s.scores);
      soften_panel(s.scores, count, s.highest + panel * kPanel, s.sums + panel * kPanel, values,
                   a.head_dim_v);
      if (masked && strange) {
        add_seen_values(a, begin, count, positions, s.v, dv, s.scores, values);
        continue;
      }
      for (int64_t d = 0; d < dv; d += kBroadcast) {
        multiply_panel<true>(s.v + d, 1, dv, s.scores, count, values + d * kPanel);
      }
    }
  }
  for (int64_t lane = 0; lane < item.row_end - item.row_begin; ++lane) {
    const int64_t row = item.row_begin + lane;
    const float* values = s.values + lane / kPanel * kPanel * dv + lane % kPanel;
    for (int64_t d = 0; d < a.head_dim_v; ++d) s.row[d] = values[d * kPanel];
    write_row(a, first_row + row / group, item.kv_head * group + row % group, s.highest[lane],
              s.sums[lane], s.row);
  }
}

void prefill(const Attention& a, const PrefillItem& item, void* scratch) {
  switch (a.k.dtype) {
    case DType::kFloat32:
      return prefill_typed<float>(a, item, scratch);
    case DType::kFloat16:
      return prefill_typed<Half>(a, item, scratch);
    case DType::kBFloat16:
      return prefill_typed<BFloat>(a, item, scratch);
    case DType::kFloat8E4M3:
      return prefill_typed<E4M3>(a, item, scratch);
    case DType::kFloat8E5M2:
      return prefill_typed<E5M2>(a, item, scratch);
    case DType::kInt8:
      return prefill_typed<Int8>(a, item, scratch);
  }
}
