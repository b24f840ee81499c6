// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Element types for the oracles, by definition and in double: no code of the kernels is used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "kernels/cuda/kernels.hpp"

namespace oracle {

using kvxfer::kernels::cuda::Element;

struct Format {
  int digits, min_exponent, bias;  // significant bits, weight of the last place of a subnormal
  double max;
};

inline Format format_of(Element element) {
  switch (element) {
    case Element::kFloat32:
      return {24, -149, 127, 0};
    case Element::kFloat16:
      return {11, -24, 15, 65504};
    case Element::kBFloat16:
      return {8, -133, 127, 0};
    default:
      return {4, -9, 7, 448};
  }
}

// The bits of a value that is rounded to nearest even; fp8 saturates, fp16 overflows to infinity.
inline uint32_t encode(double value, Element element) {
  const auto as_float = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &as_float, 4);
  if (element == Element::kFloat32) return bits;
  const Format f = format_of(element);
  const int size = element == Element::kE4m3 ? 8 : 16;
  const uint32_t sign = std::signbit(value) ? 1u << (size - 1) : 0;
  double magnitude = std::fabs(value);
  if (element == Element::kE4m3) magnitude = std::fmin(magnitude, 448);
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - f.digits, f.min_exponent);
  const double places = std::nearbyint(std::ldexp(magnitude, -unit));
  if (element == Element::kFloat16 && std::ldexp(places, unit) > f.max) return sign | 0x7c00;
  // The leading 1 of a normal number's places adds 1 to the exponent field.
  const auto field = static_cast<uint32_t>(unit - f.min_exponent) << (f.digits - 1);
  return sign | (field + static_cast<uint32_t>(places));
}

inline double decode(uint32_t bits, Element element) {
  if (element == Element::kFloat32) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const Format f = format_of(element);
  const int size = element == Element::kE4m3 ? 8 : 16;
  const uint32_t magnitude = bits & ((1u << (size - 1)) - 1);
  const auto exponent = static_cast<int>(magnitude >> (f.digits - 1));
  const auto fraction = static_cast<int>(magnitude & ((1u << (f.digits - 1)) - 1));
  if (element == Element::kE4m3 && magnitude == 0x7f) return std::nan("");
  if (element != Element::kE4m3 && exponent == 2 * f.bias + 1) {
    return fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  }
  const double places = exponent == 0 ? fraction : fraction + (1 << (f.digits - 1));
  const double value = std::ldexp(places, std::max(exponent, 1) - 1 + f.min_exponent);
  return bits >> (size - 1) & 1 ? -value : value;
}

inline size_t size_of(Element element) {
  return element == Element::kFloat32 ? 4 : element == Element::kE4m3 ? 1 : 2;
}

inline void put(void* at, double value, Element element) {
  const uint32_t bits = encode(value, element);
  std::memcpy(at, &bits, size_of(element));
}

inline double get(const void* at, Element element) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, size_of(element));
  return decode(bits, element);
}

// How often each test is repeated, with another order of threads and blocks each time.
inline int num_seeds() {
  const char* given = std::getenv("KVXFER_SHIM_SEEDS");
  return given ? std::stoi(given) : 1;
}

}  // namespace oracle
