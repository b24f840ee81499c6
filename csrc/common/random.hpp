// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Unguessable bytes from the kernel: incarnations, keys, nonces.
#pragma once

#include <array>
#include <cstddef>
#include <span>

namespace kvxfer {

void fill_random(std::span<std::byte> out);

template <size_t N>
std::array<std::byte, N> random_bytes() {
  std::array<std::byte, N> out;
  fill_random(out);
  return out;
}

}  // namespace kvxfer
