// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What every CPU of the target architecture has: SSE2 on x86-64, NEON on Arm.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.hpp"

#define KVXFER_SIMD_BYTES 16
#define KVXFER_SIMD_NAMESPACE baseline
#define KVXFER_SIMD_NAME "baseline"
#include "kernels/cpu/isa_table_impl.hpp"
