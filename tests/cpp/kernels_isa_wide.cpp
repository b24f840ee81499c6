// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The kernels in AVX-512's width, but of instructions that every CPU has: so the paths for 16 lanes
// are tested on machines without AVX-512 too.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.hpp"

#define KVXFER_SIMD_BYTES 64
#define KVXFER_SIMD_NAMESPACE wide
#define KVXFER_SIMD_NAME "wide"
#include "kernels/cpu/isa_table_impl.hpp"
