// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, DQ, VL (x86-64-v4).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.hpp"

// After the library's headers: their inline functions must not be compiled for this CPU, or the
// linker might keep that copy for everyone.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define KVXFER_SIMD_X86 1
#define KVXFER_SIMD_F16C 1
#define KVXFER_SIMD_BYTES 64
#define KVXFER_SIMD_NAMESPACE avx512
#define KVXFER_SIMD_NAME "avx512"
#include "kernels/cpu/isa_table_impl.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
