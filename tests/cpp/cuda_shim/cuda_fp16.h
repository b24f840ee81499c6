// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// __half on the CPU: its bits, converted by arithmetic that shares nothing with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

struct alignas(2) __half {
  uint16_t bits = 0;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const float sign = (h.bits & 0x8000) ? -1.0f : 1.0f;
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<float>::quiet_NaN()
                    : sign * std::numeric_limits<float>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude == 0) return {sign};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the weight of the last place
  const auto places = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // The leading 1 of a normal number's `places` adds 1 to the exponent field.
  const int code = ((unit + 24) << 10) + places;
  return {static_cast<uint16_t>(sign | code)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
