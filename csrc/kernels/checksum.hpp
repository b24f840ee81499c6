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

KVXFER_HOST_DEVICE inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Words 2 * pair and 2 * pair + 1 of a row; behind the row's end words are 0.
KVXFER_HOST_DEVICE inline uint64_t checksum_pair(uint32_t pair, uint32_t low, uint32_t high) {
  const uint64_t keys = splitmix64(pair);
  const auto a = static_cast<uint32_t>(low + static_cast<uint32_t>(keys));
  const auto b = static_cast<uint32_t>(high + static_cast<uint32_t>(keys >> 32));
  return uint64_t{a} * b;
}

// `pairs`: the sum of checksum_pair over the row. part: 0 k, 1 v, 2 latent, 3 state, 4 k_scale,
// 5 v_scale; layer and head of the model, token of the sequence.
KVXFER_HOST_DEVICE inline uint64_t checksum_row(uint64_t pairs, uint64_t layer, uint64_t part,
                                                uint64_t head, uint64_t token) {
  const uint64_t where =
      splitmix64(splitmix64(splitmix64(splitmix64(layer) ^ part) ^ head) ^ token);
  return splitmix64(pairs ^ where);
}

}  // namespace kvxfer::kernels
