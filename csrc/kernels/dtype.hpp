// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Element types of queries and caches.
#pragma once

#include <cstdint>

namespace kvxfer::kernels {

enum class DType : uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline constexpr int64_t itemsize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace kvxfer::kernels
