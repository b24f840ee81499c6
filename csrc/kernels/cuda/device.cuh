// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the kernels share: conversion of elements, accesses by width, launches, dispatch over
// dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"
#include "kernels/cuda/ptx.cuh"

namespace kvxfer::kernels::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(E4m3 x) { return e4m3_to_float(x); }

// Round to nearest even, as every other backend; fp8 saturates.
template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline E4m3 narrow<E4m3>(float x) {
  return narrow_e4m3(x);
}

// Divides by one number again and again, rounded as a division is, so that what is stored equals
// what engines store bit for bit. Where results are narrowed to fp16 or fp8, a product with the
// reciprocal is corrected by its own remainder (Markstein), which is a division's result wherever
// neither is tiny or huge; there fp16 and fp8 hold 0 or their largest either way.
struct Divider {
  float divisor, reciprocal;
  bool corrects;
};

__device__ inline Divider divider_of(float divisor, bool narrows) {
  return {divisor, __frcp_rn(divisor), narrows && divisor > 0x1p-100f && divisor < 0x1p+100f};
}

__device__ inline float divide(float x, const Divider& by) {
  if (!by.corrects) return __fdiv_rn(x, by.divisor);
  const float near = __fmul_rn(x, by.reciprocal);
  const float closer = __fmaf_rn(__fmaf_rn(-near, by.divisor, x), by.reciprocal, near);
  // Of inf the remainder would be NaN, and of -0 the sum is 0.
  return fabsf(near) < INFINITY && near != 0 ? closer : near;
}

template <class To>
inline constexpr bool kNarrows = std::is_same_v<To, __half> || sizeof(To) == 1;

// The unsigned integer of one access of that many bytes.
template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<16> {
  using Type = uint4;
};
template <>
struct AccessOf<8> {
  using Type = uint2;
};
template <>
struct AccessOf<4> {
  using Type = uint32_t;
};
template <>
struct AccessOf<2> {
  using Type = uint16_t;
};
template <>
struct AccessOf<1> {
  using Type = uint8_t;
};

// kCount adjacent elements, moved in accesses of 16 bytes, or fewer where they are fewer. .cs
// (evict first): a cache is read or written once, and need not stay.
template <class T, int kCount>
struct Elements {
  static constexpr int kBytes = sizeof(T) * kCount;
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  using Access = typename AccessOf<kAccess>::Type;
  union {
    Access access[kBytes / kAccess];
    T value[kCount];
  };

  __device__ Elements() {}
  __device__ void load(const char* from) {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) {
      access[i] = __ldcs(reinterpret_cast<const Access*>(from) + i);
    }
  }
  __device__ void store(char* to) const {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) __stcs(reinterpret_cast<Access*>(to) + i, access[i]);
  }
};

template <class Body>
void with_type(Element element, Body body) {
  switch (element) {
    case Element::kFloat32:
      return body(float{});
    case Element::kFloat16:
      return body(__half{});
    case Element::kBFloat16:
      return body(__nv_bfloat16{});
    case Element::kE4m3:
      return body(E4m3{});
  }
}

template <class Body>
void with_access(int32_t nbytes, Body body) {
  switch (nbytes) {
    case 16:
      return body(uint4{});
    case 8:
      return body(uint2{});
    case 4:
      return body(uint32_t{});
    case 2:
      return body(uint16_t{});
    default:
      return body(uint8_t{});
  }
}

// More than 48 KiB of shared memory has to be asked for.
template <class... Params>
void allow_shared(void (*kernel)(Params...), size_t nbytes) {
  if (nbytes > (size_t{48} << 10)) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(nbytes));
  }
}

inline int num_sms() {
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  return std::max(sms, 1);
}

// Thread blocks of a kernel that the current device holds at once; at least 1.
template <class... Params>
int64_t resident_ctas(void (*kernel)(Params...), int threads, size_t shared_nbytes) {
  allow_shared(kernel, shared_nbytes);
  int per_sm = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_nbytes);
  return int64_t{std::max(per_sm, 1)} * num_sms();
}

// Names the kernel where the launch is refused; whatever goes wrong later is the stream's.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads,
            size_t shared_nbytes, cudaStream_t stream, const Args&... args) {
  if (ctas > INT32_MAX) fail(Code::kInvalidArgument, name, ": too large a grid: ", ctas, " blocks");
  allow_shared(kernel, shared_nbytes);
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(ctas);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_nbytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it would be reported again by somebody else's call
    fail(Code::kInternal, name, ": launch failed: ", cudaGetErrorString(error));
  }
}

}  // namespace kvxfer::kernels::cuda
