// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Element types of queries and caches.
#pragma once

#include <cstdint>

namespace kvxfer::kernels {

// The last three are of caches only: a query or an output has one of the first three.
enum class DType : uint8_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat8E4M3 = 3,  // OCP e4m3fn: no infinity, largest 448
  kFloat8E5M2 = 4,  // largest finite 57344
  kInt8 = 5,
};

inline constexpr int64_t itemsize(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype <= DType::kBFloat16 ? 2 : 1;
}

}  // namespace kvxfer::kernels
