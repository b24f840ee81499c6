// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// fp8 e4m3 in software, for host and device: GPUs before sm_89 have no instruction for it.
#pragma once

#include <cstdint>

#include "kernels/index_math.hpp"

namespace kvxfer::kernels {

struct E4m3 {
  uint8_t bits;
};

inline constexpr float kE4m3Max = 448;

KVXFER_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}

KVXFER_HOST_DEVICE inline uint32_t bits_of_float(float value) {
  union {
    float value;
    uint32_t bits;
  } both{value};
  return both.bits;
}

// The code's exponent and fraction in a float's place are the value times 2^-120, also for
// subnormals; a product with a power of two is exact.
KVXFER_HOST_DEVICE inline float e4m3_to_float(E4m3 code) {
  const uint32_t magnitude = code.bits & 0x7fu, sign = uint32_t{code.bits & 0x80u} << 24;
  if (magnitude == 0x7f) return float_of_bits(sign | 0x7fc00000u);
  const float scaled = float_of_bits(magnitude << 20) * float_of_bits((127u + 120u) << 23);
  return float_of_bits(bits_of_float(scaled) | sign);
}

// Rounds to nearest even and saturates at 448, as cvt.rn.satfinite does; NaN stays NaN.
KVXFER_HOST_DEVICE inline E4m3 float_to_e4m3(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude > 0x7f800000u) {
    code = 0x7f;
  } else if (magnitude >= bits_of_float(kE4m3Max)) {
    code = 0x7e;
  } else if (magnitude < bits_of_float(0.015625f)) {  // below 2^-6: multiples of 2^-9
    // The sum's last place weighs 2^-9, so the addition itself rounds.
    code = bits_of_float(float_of_bits(magnitude) + 16384.0f) - bits_of_float(16384.0f);
  } else {
    code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return {static_cast<uint8_t>(sign | code)};
}

// Two codes to two fp16 in one register; exact, but NaN codes become 480.
KVXFER_HOST_DEVICE inline uint32_t e4m3x2_to_half2_over_256(uint32_t codes) {
  const uint32_t spread = (codes & 0xffu) | (codes & 0xff00u) << 8;
  return (spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 7;
}

}  // namespace kvxfer::kernels
