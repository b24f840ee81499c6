// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Where decode's keys and values lie, how many are taken at a time, and in which order their lines
// are asked for. Included per instruction set (isa_*.cpp).
#pragma once

// Keys whose scores become weights together, a tile: some 4 KiB of keys, since what is done once
// per tile counts, and two tiles of keys and values of a head, this one and the next, must fit into
// the core's nearest cache, whose sets a token-major cache uses unevenly: with 16 KiB the lines
// asked for were gone before their turn. Where 16 lanes make short work of the products, 8 KiB: the
// sums and weights of a tile wait for each other. A step takes one query row and as many keys as
// lanes.
constexpr int64_t kMostTile = 32, kLeastTile = kLanes > 8 ? kLanes : 8;
constexpr int64_t kTileBytes = kLanes == 16 ? 8192 : 4096;

template <class T>
KVXFER_INLINE int64_t tile_of(const Attention& a) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  int64_t tile = kMostTile;
  while (tile > kLeastTile && tile * width * static_cast<int64_t>(sizeof(T)) > kTileBytes)
    tile /= 2;
  return tile;
}

// Keys that are walked for one head before the next: a tile, or in a head-major cache as much as
// lies together there.
constexpr int64_t kMostKeys = 64;

KVXFER_INLINE int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Addresses of some keys' rows for head 0, computed once for all heads.
template <class T>
struct KeyRows {
  // What lies behind the last key is only asked for, as where a tile is filled up to whole steps.
  static constexpr int64_t kRoom = kMostKeys + 2 * kLanes;
  const T* k[kRoom];
  const T* v[kRoom];
  int64_t begin = 0, count = 0;

  KeyRows(const T* any_k, const T* any_v) {
    for (int64_t i = 0; i < kRoom; ++i) k[i] = any_k, v[i] = any_v;
  }
};

template <class T>
KVXFER_INLINE void locate_rows(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                               KeyRows<T>& rows) {
  const int32_t* table = a.block_table + sequence * a.table_stride;
  int64_t column = begin / a.block_size, offset = begin - column * a.block_size;
  rows.begin = begin;
  rows.count = end - begin;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t block = table[column];
    rows.k[i] = static_cast<const T*>(a.k.data) + row_offset(a.k.strides, block, offset, 0);
    rows.v[i] = static_cast<const T*>(a.v.data) + row_offset(a.v.strides, block, offset, 0);
    if (++offset == a.block_size) offset = 0, ++column;
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

// What is asked for while a unit (a tile of one head) is multiplied, one line here and one there:
// in bursts the requests would fill the core's few miss buffers, and the products would wait. As
// many lines as the unit itself has, in the order in which they lie: half as many come where they
// are asked for across rows. A head with more query rows than fit at once goes over its tile in
// several passes, each of which asks for its share.
template <class T>
struct Ahead {
  const T *const *row, *const *last;
  int64_t shift, at, width;  // channels: where these heads begin in a row; the next line; their end
  int64_t passes, pass = 0;

  // How far one request of this step moves on; where others ask, the same line is asked for again,
  // which costs less than a second loop.
  KVXFER_INLINE int64_t stride(int64_t step, int64_t line) const {
    return passes == 1 || step % passes == pass ? line : 0;
  }
  KVXFER_INLINE void ask(int64_t stride) {
    __builtin_prefetch(*row + shift + at, 0, 2);
    at += stride;
    if (at >= width) at = 0, row += row < last;
  }
};

template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // channels per cache line
