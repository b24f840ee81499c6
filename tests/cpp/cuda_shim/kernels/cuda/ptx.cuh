// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Host bodies of csrc/kernels/cuda/ptx.cuh, found before it. A copy lands only when it is waited
// for, and until then its destination is poison.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <type_traits>
#include <vector>

#include "kernels/fp8.hpp"

namespace shim {

struct Copy {
  char* dst;
  const char* src;
  bool wanted;
};

// The groups that this thread has under way; the last one is still open.
inline std::deque<std::vector<Copy>>& my_groups() {
  struct Groups {
    uint64_t block = 0;
    std::deque<std::vector<Copy>> list;
  };
  static std::vector<Groups> all(1024);
  Groups& mine = all[thread()];
  if (mine.block != block_number()) mine = {block_number(), std::deque<std::vector<Copy>>(1)};
  return mine.list;
}

inline void check_shared(const void* p, size_t nbytes) {
  const char* address = static_cast<const char*>(p);
  if (address < shared_memory() || address + nbytes > shared_memory() + shared_bytes()) {
    stop_launch("an access beyond shared memory");
  }
  if (reinterpret_cast<uintptr_t>(address) % nbytes != 0) stop_launch("a misaligned access");
}

struct Matrices {
  const void* row;
  uint32_t* to;
};

inline uint16_t element(void* const* all, int matrix, int row, int column) {
  uint16_t value;
  std::memcpy(
      &value,
      static_cast<const char*>(static_cast<Matrices*>(all[matrix * 8 + row])->row) + column * 2, 2);
  return value;
}

template <bool kTransposed>
void load_matrices(void* const* all) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        pair[i] =
            kTransposed ? element(all, matrix, column, row) : element(all, matrix, row, column);
      }
      static_cast<Matrices*>(all[lane])->to[matrix] = pair[0] | pair[1] << 16;
    }
  }
}

template <class T>
float widen_half(uint32_t pair, int index) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> (16 * index));
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// By the fragment tables of the PTX manual: group = lane / 4, t = lane % 4.
template <class T>
void multiply(void* const* all) {
  const auto lane = [&](int i) -> Mma& { return *static_cast<Mma*>(all[i]); };
  float a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const int group = i / 4, t = i % 4;
    for (int pair = 0; pair < 2; ++pair) {
      for (int reg = 0; reg < 4; ++reg) {
        a[group + (reg & 1) * 8][t * 2 + pair + (reg & 2) * 4] =
            widen_half<T>(lane(i).a[reg], pair);
      }
      for (int reg = 0; reg < 2; ++reg) {
        b[t * 2 + pair + reg * 8][group] = widen_half<T>(lane(i).b[reg], pair);
      }
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int reg = 0; reg < 4; ++reg) {
      const int row = i / 4 + (reg & 2) * 4, column = i % 4 * 2 + (reg & 1);
      float sum = lane(i).c[reg];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane(i).c[reg] = sum;
    }
  }
}

// The value of a code by its definition, for the instruction that sm_89 and later have.
inline float e4m3_value(uint32_t code) {
  static const auto values = [] {
    std::array<float, 256> all{};
    for (int i = 0; i < 256; ++i) {
      const int exponent = i >> 3 & 15, fraction = i & 7;
      const float magnitude = std::ldexp(
          static_cast<float>(exponent == 0 ? fraction : fraction + 8), std::max(exponent, 1) - 10);
      all[i] = (i & 0x7f) == 0x7f ? std::nanf("") : i < 128 ? magnitude : -magnitude;
    }
    return all;
  }();
  return values[code];
}

}  // namespace shim

namespace kvxfer::kernels::cuda {

inline char* shared_memory() { return shim::shared_memory(); }

inline void cp_async16(void* dst, const void* src, bool wanted) {
  shim::check_shared(dst, 16);
  std::memset(dst, 0xff, 16);
  shim::my_groups().back().push_back(
      {static_cast<char*>(dst), static_cast<const char*>(src), wanted});
}
inline void cp_async_commit() { shim::my_groups().emplace_back(); }
template <int kPending>
void cp_async_wait() {
  auto& mine = shim::my_groups();
  while (mine.size() > kPending + 1) {
    for (const shim::Copy& copy : mine.front()) {
      if (copy.wanted) {
        std::memcpy(copy.dst, copy.src, 16);
      } else {
        std::memset(copy.dst, 0, 16);
      }
    }
    mine.pop_front();
  }
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  shim::check_shared(row, 16);
  shim::Matrices mine{row, to};
  shim::meet(shim::kLdmatrix, &mine, &shim::load_matrices<false>);
}
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  shim::check_shared(row, 16);
  shim::Matrices mine{row, to};
  shim::meet(shim::kLdmatrixTrans, &mine, &shim::load_matrices<true>);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::Mma mine{c, a, {b0, b1}};
  shim::meet(shim::kMma, &mine, &shim::multiply<T>);
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint32_t e4m3x2_to_half2(uint32_t codes) {
  const __half low = __float2half_rn(shim::e4m3_value(codes & 0xff));
  const __half high = __float2half_rn(shim::e4m3_value(codes >> 8 & 0xff));
  return low.bits | uint32_t{high.bits} << 16;
}

inline E4m3 narrow_e4m3(float value) {
  uint8_t best = 0x7f;
  float distance = INFINITY;
  const float clamped = std::fmin(std::fmax(value, -448.0f), 448.0f);
  if (std::isnan(value)) return {best};
  for (int code = 0; code < 256; ++code) {
    const float off = std::fabs(shim::e4m3_value(static_cast<uint32_t>(code)) - clamped);
    const bool same_sign = (code >= 128) == std::signbit(value);
    // A tie goes to the even code; of the two zeros the sign decides.
    if (same_sign && (off < distance || (off == distance && code % 2 == 0))) {
      distance = off;
      best = static_cast<uint8_t>(code);
    }
  }
  return {best};
}

}  // namespace kvxfer::kernels::cuda
