// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The checksum of a KV row, for every backend the same number: NH over 32-bit words, mixed with the
// row's coordinate, summed over rows modulo 2^64. The sum has no order, so any grid or number of
// threads gives it, and two layouts of the same content agree. It finds flipped bits, swapped
// blocks, heads or tokens and stale rows; it is no defence against an adversary.
#pragma once

#include <cstdint>

#include "kernels/index_math.hpp"

namespace kvxfer::kernels {

// The finaliser of splitmix64.
KVXFER_HOST_DEVICE inline uint64_t mix64(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

inline constexpr int32_t kMaxHashedRow = 4096;  // bytes; one key word per 4 of them

// Word i of the keys: splitmix64 from seed 0, its upper halves.
KVXFER_HOST_DEVICE inline uint32_t hash_key(uint32_t i) {
  return static_cast<uint32_t>(mix64((i + uint64_t{1}) * 0x9e3779b97f4a7c15u) >> 32);
}

// Words 2i and 2i + 1 of a row with their keys; behind the row's end words are 0.
KVXFER_HOST_DEVICE inline uint64_t hash_pair(uint32_t low, uint32_t high, uint32_t key_low,
                                             uint32_t key_high) {
  return uint64_t{low + key_low} * uint64_t{high + key_high};
}

// `pairs`: the sum of hash_pair over the row. part: 0 k, 1 v, 2 latent, 3 state, and 8 more for the
// scales of each; layer and head of the model, token of the sequence.
KVXFER_HOST_DEVICE inline uint64_t hash_row(uint64_t pairs, uint64_t part, uint64_t layer,
                                            uint64_t head, uint64_t token) {
  return mix64(pairs ^ mix64(part << 60 | layer << 48 | head << 32 | token));
}

}  // namespace kvxfer::kernels
