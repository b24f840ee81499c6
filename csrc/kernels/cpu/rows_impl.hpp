// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Rows between element types, and the merge of two attention states. Included per instruction set
// (isa_*.cpp).
#pragma once

KVXFER_INLINE uint16_t narrow_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits & 0x80000000u) >> 16;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u | ((bits >> 13) & 0x3ffu);  // NaN, made quiet
  } else if (bits >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and more: infinity (65520 to 65535 round up to it below)
  } else if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa to half's last bit, and rounds to nearest even.
    float aligned;
    __builtin_memcpy(&aligned, &bits, 4);
    aligned += 0.5f;
    __builtin_memcpy(&half, &aligned, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

KVXFER_INLINE uint16_t narrow_to_bfloat(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

KVXFER_INLINE void store(BFloat* p, Vf v) {
  const Vu bits = reinterpret_cast<Vu>(v);
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vu quiet = (bits >> 16) | 0x40u;
  const Vu nan = reinterpret_cast<Vu>(v != v);
  *reinterpret_cast<VhLoose*>(p) = __builtin_convertvector((nan & quiet) | (~nan & rounded), Vh);
}

KVXFER_INLINE void store(Half* p, Vf v) {
#if defined(KVXFER_SIMD_F16C) && KVXFER_SIMD_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(KVXFER_SIMD_F16C) && KVXFER_SIMD_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = narrow_to_half(v[i]);
#endif
}

// Floats as 8-bit floats of kMantissa bits: to nearest even, finite ones saturate, a NaN stays one.
// `smallest` is the least normal value; adding `align` puts a subnormal's last bit at the float's.
template <int kMantissa, int kBias>
KVXFER_INLINE Vb narrow_to_8(Vf v, float largest, float smallest, float align, uint32_t nan) {
  constexpr int kDrop = 23 - kMantissa;
  const Vu bits = reinterpret_cast<Vu>(v);
  const Vu sign = (bits >> 24) & 0x80u;
  const Vf magnitude = reinterpret_cast<Vf>(bits & 0x7fffffffu);
  const Vf bounded = magnitude > largest ? splat(largest) : magnitude;
  const Vu from = reinterpret_cast<Vu>(bounded);
  const Vu normal =
      (from - (uint32_t{127 - kBias} << 23) + ((1u << (kDrop - 1)) - 1) + ((from >> kDrop) & 1u)) >>
      kDrop;
  const Vf aligned = bounded + align;
  const Vu tiny = reinterpret_cast<Vu>(aligned) - reinterpret_cast<Vu>(splat(align));
  const Vu is_tiny = reinterpret_cast<Vu>(bounded < smallest);
  const Vu is_nan = reinterpret_cast<Vu>(v != v);
  const Vu code = (is_tiny & tiny) | (~is_tiny & normal);
  return __builtin_convertvector(sign | (is_nan & nan) | (~is_nan & code), Vb);
}

KVXFER_INLINE void store(E4M3* p, Vf v) {
  *reinterpret_cast<VbLoose*>(p) = narrow_to_8<3, 7>(v, 448.0f, 0x1p-6f, 0x1p14f, 0x7fu);
}

KVXFER_INLINE void store(E5M2* p, Vf v) {
  *reinterpret_cast<VbLoose*>(p) = narrow_to_8<2, 15>(v, 57344.0f, 0x1p-14f, 0x1p7f, 0x7fu);
}

KVXFER_INLINE void store(Int8* p, Vf v) {
  const Vf low = splat(-128.0f), high = splat(127.0f);
  Vf bounded = v > low ? v : low;  // a NaN becomes the lowest, as there is no code for it
  bounded = bounded < high ? bounded : high;
  const Vf magic = splat(0x1.8p23f);  // leaves the value, rounded to even, in the low bits
  const Vi whole = reinterpret_cast<Vi>(bounded + magic) - reinterpret_cast<Vi>(magic);
  *reinterpret_cast<VsLoose*>(p) = __builtin_convertvector(whole, Vs);
}

template <class T>
KVXFER_INLINE void store_part(T* p, Vf v, int64_t n) {
  T whole[kLanes];
  store(whole, v);
  for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}

template <class S, class D>
void convert_row(const S* src, D* dst, int64_t n, float multiplier, float divisor) {
  // A true division, as engines do it: a multiplication by the reciprocal rounds differently.
  const bool divided = divisor != 1.0f, multiplied = multiplier != 1.0f;
  const auto scale = [&](Vf v) {
    if (multiplied) v *= multiplier;
    return divided ? v / divisor : v;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, scale(load(src + i)));
  if (i < n) store_part(dst + i, scale(load_part(src + i, n - i)), n - i);
}

template <class Body>
KVXFER_INLINE void with_type(DType dtype, const void* p, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<const float*>(p));
    case DType::kFloat16:
      return body(static_cast<const Half*>(p));
    case DType::kBFloat16:
      return body(static_cast<const BFloat*>(p));
    case DType::kFloat8E4M3:
      return body(static_cast<const E4M3*>(p));
    case DType::kFloat8E5M2:
      return body(static_cast<const E5M2*>(p));
    case DType::kInt8:
      return body(static_cast<const Int8*>(p));
  }
}

template <class Body>
KVXFER_INLINE void with_type(DType dtype, void* p, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<float*>(p));
    case DType::kFloat16:
      return body(static_cast<Half*>(p));
    case DType::kBFloat16:
      return body(static_cast<BFloat*>(p));
    case DType::kFloat8E4M3:
      return body(static_cast<E4M3*>(p));
    case DType::kFloat8E5M2:
      return body(static_cast<E5M2*>(p));
    case DType::kInt8:
      return body(static_cast<Int8*>(p));
  }
}

void convert(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n,
             float multiplier, float divisor) {
  with_type(src_dtype, src, [&](auto* s) {
    with_type(dst_dtype, dst, [&](auto* d) { convert_row(s, d, n, multiplier, divisor); });
  });
}

float largest(const void* src, DType dtype, int64_t n) {
  float result = 0;
  with_type(dtype, src, [&](auto* s) {
    Vf top{};
    const auto take = [&](Vf v) {
      const Vf magnitude = v < 0.0f ? -v : v;
      top = magnitude > top ? magnitude : top;
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) take(load(s + i));
    if (i < n) take(load_part(s + i, n - i));
    result = max_lanes(top);
  });
  return result;
}

KVXFER_INLINE const char* row_of(const Rows& rows, int64_t row, int64_t head) {
  return static_cast<const char*>(rows.data) +
         (row * rows.stride_row + head * rows.stride_head) * itemsize(rows.dtype);
}
KVXFER_INLINE char* row_of_mut(const Rows& rows, int64_t row, int64_t head) {
  return const_cast<char*>(row_of(rows, row, head));
}

// exp and log of single values in full float precision: once per row, so speed does not matter.
KVXFER_INLINE float scalar_exp2(float x) { return x <= -127.0f ? 0.0f : exp2_fast(splat(x))[0]; }

void merge(const Merge& m, int64_t row) {
  for (int64_t head = 0; head < m.num_heads; ++head) {
    const float lse_a = m.lse_a[row * m.lse_a_stride + head];
    const float lse_b = m.lse_b[row * m.lse_b_stride + head];
    const float highest = lse_a > lse_b ? lse_a : lse_b;
    const float base = highest == -__builtin_inff() ? 0.0f : highest;
    const float weight_a = __builtin_expf(lse_a - base), weight_b = __builtin_expf(lse_b - base);
    const float total = weight_a + weight_b;
    m.lse[row * m.num_heads + head] = total == 0 ? -__builtin_inff() : __builtin_logf(total) + base;
    const float share_a = total == 0 ? 0 : weight_a / total;
    const float share_b = total == 0 ? 0 : weight_b / total;
    with_type(m.out.dtype, row_of_mut(m.out, row, head), [&](auto* out) {
      using T = std::remove_pointer_t<decltype(out)>;
      const T* a = reinterpret_cast<const T*>(row_of(m.a, row, head));
      const T* b = reinterpret_cast<const T*>(row_of(m.b, row, head));
      for (int64_t i = 0; i < m.head_dim; i += kLanes) {
        const int64_t n = m.head_dim - i;
        // A side of weight 0 may hold anything, also NaN: it was never written.
        const Vf va = share_a == 0 ? Vf{} : n < kLanes ? load_part(a + i, n) : load(a + i);
        const Vf vb = share_b == 0 ? Vf{} : n < kLanes ? load_part(b + i, n) : load(b + i);
        const Vf sum = va * share_a + vb * share_b;
        if (n < kLanes) {
          store_part(out + i, sum, n);
        } else {
          store(out + i, sum);
        }
      }
    });
  }
}

typedef uint64_t Vq __attribute__((vector_size(KVXFER_SIMD_BYTES)));
typedef uint32_t VuLoose __attribute__((vector_size(KVXFER_SIMD_BYTES), aligned(4), may_alias));

// The products of the lower and the upper words of each 64-bit lane.
KVXFER_INLINE Vq multiply_pairs(Vu words) {
  const Vq low = reinterpret_cast<Vq>(words), high = low >> 32;
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return reinterpret_cast<Vq>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high)));
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return reinterpret_cast<Vq>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high)));
#else
  return (low & 0xffffffffu) * high;
#endif
}

uint64_t sum_pairs(const void* row, int64_t nbytes, const uint32_t* keys) {
  const auto* bytes = static_cast<const unsigned char*>(row);
  Vq sums{};
  int64_t at = 0;
  for (; at + KVXFER_SIMD_BYTES <= nbytes; at += KVXFER_SIMD_BYTES) {
    Vu words;
    __builtin_memcpy(&words, bytes + at, sizeof words);
    sums += multiply_pairs(words + *reinterpret_cast<const VuLoose*>(keys + at / 4));
  }
  uint64_t total = 0;
  for (int i = 0; i < KVXFER_SIMD_BYTES / 8; ++i) total += sums[i];
  for (; at < nbytes; at += 8) {
    uint32_t pair[2] = {};
    __builtin_memcpy(pair, bytes + at, static_cast<uint64_t>(nbytes - at < 8 ? nbytes - at : 8));
    total += static_cast<uint64_t>(pair[0] + keys[at / 4]) * (pair[1] + keys[at / 4 + 1]);
  }
  return total;
}

// To call memcpy for one head's row of a token takes as long as to copy it.
void copy_runs(char* dst, const char* src, const RunShape& shape) {
  constexpr int64_t kMostShort = 1024;
  constexpr auto kVector = static_cast<int64_t>(sizeof(Vi));
  if (shape.run > kMostShort || shape.run % kVector != 0) {
    return for_runs(shape, dst, src, [&](char* to, const char* from) {
      __builtin_memcpy(to, from, static_cast<uint64_t>(shape.run));
    });
  }
  for_runs(shape, dst, src, [&](char* to, const char* from) {
#pragma GCC unroll 4
    for (int64_t at = 0; at < shape.run; at += kVector) {
      store_bytes(to + at, load_bytes(from + at));
    }
  });
}
