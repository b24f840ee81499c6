// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The part of CUDA's language and runtime that the kernels use, so that g++ compiles their sources.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "cuda_runtime_api.h"
#include "grid.hpp"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  uint32_t x, y, z;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const dim3 &g = config->gridDim, &b = config->blockDim;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535) return cudaErrorInvalidValue;
  shim_stream = config->stream;
  const std::tuple<std::decay_t<Params>...> values(std::forward<Args>(args)...);
  shim::run({{g.x, g.y, g.z}, {b.x, b.y, b.z}, config->dynamicSmemBytes},
            [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

namespace shim {

enum Kind { kSyncWarp = 1, kShuffle, kVote, kLdmatrix, kLdmatrixTrans, kMma };

template <class T>
struct Shuffled {
  T value, result;
  int source;
};

template <class T>
T shuffle(T value, int source) {
  Shuffled<T> mine{value, value, source};
  meet(kShuffle, &mine, [](void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Shuffled<T>*>(all[i]);
      to->result = static_cast<Shuffled<T>*>(all[to->source])->value;
    }
  });
  return mine.result;
}

}  // namespace shim

inline void __syncthreads() { shim::wait_for_block(); }
inline void __syncwarp() {
  shim::meet(shim::kSyncWarp, nullptr, [](void* const*) {});
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return shim::shuffle(value, source % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::shuffle(value, shim::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const int source = shim::lane() + static_cast<int>(delta);
  return shim::shuffle(value, source < 32 ? source : shim::lane());
}
inline int __any_sync(unsigned, int predicate) {
  int any = predicate;
  shim::meet(shim::kVote, &any, [](void* const* all) {
    int value = 0;
    for (int i = 0; i < 32; ++i) value |= *static_cast<int*>(all[i]);
    for (int i = 0; i < 32; ++i) *static_cast<int*>(all[i]) = value;
  });
  return any != 0;
}

// Blocks run one after the other, so an atomic is an ordinary access and a fence is nothing.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
inline void __threadfence() {}

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
