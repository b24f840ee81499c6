// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Vectors of float by the compiler's vector extensions, in the width KVXFER_SIMD_BYTES. Included
// once per instruction set, inside that set's namespace and target pragma (see isa_*.cpp); it
// includes nothing itself, so that no library function is compiled for a CPU that this one is not.
#pragma once

constexpr int kLanes = KVXFER_SIMD_BYTES / 4;

typedef float Vf __attribute__((vector_size(KVXFER_SIMD_BYTES)));
typedef int32_t Vi __attribute__((vector_size(KVXFER_SIMD_BYTES)));
typedef uint32_t Vu __attribute__((vector_size(KVXFER_SIMD_BYTES)));
typedef uint16_t Vh __attribute__((vector_size(KVXFER_SIMD_BYTES / 2)));
typedef float V4 __attribute__((vector_size(16)));
typedef float VfLoose __attribute__((vector_size(KVXFER_SIMD_BYTES), aligned(4), may_alias));
typedef uint16_t VhLoose __attribute__((vector_size(KVXFER_SIMD_BYTES / 2), aligned(2), may_alias));
typedef uint8_t Vb __attribute__((vector_size(KVXFER_SIMD_BYTES / 4)));
typedef int8_t Vs __attribute__((vector_size(KVXFER_SIMD_BYTES / 4)));
typedef uint8_t VbLoose __attribute__((vector_size(KVXFER_SIMD_BYTES / 4), aligned(1), may_alias));
typedef int8_t VsLoose __attribute__((vector_size(KVXFER_SIMD_BYTES / 4), aligned(1), may_alias));
typedef int32_t ViLoose __attribute__((vector_size(KVXFER_SIMD_BYTES), aligned(4), may_alias));
typedef int32_t ViBytes __attribute__((vector_size(KVXFER_SIMD_BYTES), aligned(1), may_alias));

// Element types of a cache; all but float are bare bits here.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};
struct E5M2 {
  uint8_t bits;
};
struct Int8 {
  int8_t bits;
};

#define KVXFER_INLINE inline __attribute__((always_inline))
#define KVXFER_LAMBDA __attribute__((always_inline))

// Minus, because x - 0 is x for every x, so that only the broadcast is left; x + 0 would turn -0
// into 0.
KVXFER_INLINE Vf splat(float x) { return x - Vf{}; }
KVXFER_INLINE Vf load(const float* p) { return *reinterpret_cast<const VfLoose*>(p); }
KVXFER_INLINE void store(float* p, Vf v) { *reinterpret_cast<VfLoose*>(p) = v; }

KVXFER_INLINE Vi load_bytes(const char* p) { return *reinterpret_cast<const ViBytes*>(p); }
KVXFER_INLINE void store_bytes(char* p, Vi v) { *reinterpret_cast<ViBytes*>(p) = v; }

// Unsigned and signed integers, each in a wider lane. GCC makes five instructions of
// __builtin_convertvector where the CPU has one, and a cache of 16 bits is all conversion then.
KVXFER_INLINE Vu widen_words(const void* p) {
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return reinterpret_cast<Vu>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return reinterpret_cast<Vu>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const VhLoose*>(p), Vu);
#endif
}

// Codes of 8 bits in words, the sign in all bits above.
KVXFER_INLINE Vh widen_codes(const void* p) {
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return reinterpret_cast<Vh>(_mm_cvtepi8_epi16(_mm_loadu_si64(p)));
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return reinterpret_cast<Vh>(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const VsLoose*>(p), Vh);
#endif
}

KVXFER_INLINE Vi widen_signed_bytes(const void* p) {
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return reinterpret_cast<Vi>(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return reinterpret_cast<Vi>(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const VsLoose*>(p), Vi);
#endif
}

KVXFER_INLINE Vf load(const BFloat* p) { return reinterpret_cast<Vf>(widen_words(p) << 16); }

// The bits of halves, as floats.
KVXFER_INLINE Vf widen(Vh bits) {
#if defined(KVXFER_SIMD_F16C) && KVXFER_SIMD_BYTES == 32
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#elif defined(KVXFER_SIMD_F16C) && KVXFER_SIMD_BYTES == 64
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#else
  // Exponent and mantissa move up by 13 bits; times 2^112 sets the bias right, subnormals included.
  const Vu wide = __builtin_convertvector(bits, Vu);
  const Vu magnitude = (wide & 0x7fffu) << 13;
  const Vu value = reinterpret_cast<Vu>(reinterpret_cast<Vf>(magnitude) * 0x1p112f);
  const Vu special = reinterpret_cast<Vu>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return reinterpret_cast<Vf>(value | special | (wide & 0x8000u) << 16);
#endif
}

KVXFER_INLINE Vf load(const Half* p) { return widen(*reinterpret_cast<const VhLoose*>(p)); }

// e4m3 is a half short of 3 mantissa bits and 8 of exponent bias: exactly a 256th of each code's
// value, subnormals too.
template <class Words>
KVXFER_INLINE Words halves_of_e4m3(Words code) {
  // The highest exponent bit, a copy of the sign here, becomes 0, but 1 for the one code per sign
  // that is no number: there alone a carry reaches it.
  const Words shifted = code << 7, carried = shifted + 0x80;
  return (shifted & 0xbfff) | ((shifted ^ carried) & 0x4000);
}

KVXFER_INLINE Vf load(const E4M3* p) { return widen(halves_of_e4m3(widen_codes(p))) * 256.0f; }

// e5m2 is the upper byte of a half.
KVXFER_INLINE Vf load(const E5M2* p) { return widen(widen_codes(p) << 8); }

KVXFER_INLINE Vf load(const Int8* p) { return __builtin_convertvector(widen_signed_bytes(p), Vf); }

// Whether load_some takes even and odd channels apart: of bfloat16 a shift and a mask are half of
// what widening takes. With 8 lanes that was not faster.
template <class T>
constexpr bool kEvenOdd = kLanes == 16 && std::is_same_v<T, BFloat>;

#if KVXFER_SIMD_BYTES == 64
// A vector of words for two of floats: the work on the codes is done once for both.
typedef uint16_t Vw __attribute__((vector_size(64)));
typedef int8_t VwBytes __attribute__((vector_size(32), aligned(1), may_alias));

KVXFER_INLINE Vw widen_code_pairs(const void* p) {
#if defined(KVXFER_SIMD_X86)
  return reinterpret_cast<Vw>(
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const VwBytes*>(p), Vw);
#endif
}

template <int... kWord>
KVXFER_INLINE Vh half_of(Vw words, bool upper, std::integer_sequence<int, kWord...>) {
  return upper ? __builtin_shufflevector(words, words, (kLanes + kWord)...)
               : __builtin_shufflevector(words, words, kWord...);
}
#endif

// Vector i of the channels from p on, in the order that costs least.
template <class T>
KVXFER_INLINE Vf load_some(const T* p, int64_t i) {
#if KVXFER_SIMD_BYTES == 64
  if constexpr (std::is_same_v<T, E4M3>) {
    const Vw both = halves_of_e4m3(widen_code_pairs(p + i / 2 * 2 * kLanes));
    return widen(half_of(both, i % 2 != 0, std::make_integer_sequence<int, kLanes>{})) * 256.0f;
  }
#endif
  if constexpr (kEvenOdd<T>) {
    const Vu both =
        reinterpret_cast<Vu>(load_bytes(reinterpret_cast<const char*>(p + i / 2 * 2 * kLanes)));
    return reinterpret_cast<Vf>(i % 2 == 0 ? both << 16 : both & 0xffff0000u);
  } else {
    return load(p + i * kLanes);
  }
}

// Puts n floats into the order of load_some, or back; what is no whole pair of vectors stays.
template <bool kBack>
inline void order_even_odd(float* x, int64_t n) {
  constexpr int kPair = 2 * kLanes;
  for (int64_t d = 0; d + kPair <= n; d += kPair) {
    float was[kPair];
    for (int i = 0; i < kPair; ++i) was[i] = x[d + i];
    for (int i = 0; i < kPair; ++i) {
      const int apart = i / 2 + i % 2 * kLanes;  // where channel i is, taken apart
      x[d + (kBack ? i : apart)] = was[kBack ? apart : i];
    }
  }
}

// Like the instruction: when either is NaN the second operand is the result. Callers put the value
// whose NaN must go on second, and a value whose NaN is seen elsewhere first.
KVXFER_INLINE Vf max_or_second(Vf a, Vf b) {
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return _mm256_max_ps(a, b);
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The first n < kLanes elements, zeros behind them; reads nothing past them.
template <class T>
KVXFER_INLINE Vf load_part(const T* p, int64_t n) {
  T whole[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

KVXFER_INLINE V4 low_quarter_sum(Vf v) {
#if KVXFER_SIMD_BYTES == 64
  typedef float V8 __attribute__((vector_size(32)));
  const V8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif KVXFER_SIMD_BYTES == 32
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// Lanes without the bit kHalf: a's plus a's partner kHalf lanes on; those with it: b's likewise.
template <int kHalf, int... kLane>
KVXFER_INLINE Vf fold(Vf a, Vf b, std::integer_sequence<int, kLane...>) {
  const Vf own = __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? kLanes + kLane : kLane)...);
  const Vf partner = __builtin_shufflevector(
      a, b, ((kLane & kHalf) != 0 ? kLanes + (kLane ^ kHalf) : (kLane ^ kHalf))...);
  return own + partner;
}

// Lane i of the result: the sum of the lanes of v[i]. Each step folds two vectors into one, so it
// takes kLanes - 1 of them for kLanes sums.
template <int kCount>
KVXFER_INLINE Vf sum_lanes_of_each(const Vf* v, int step = 1) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kHalf = kLanes / kCount;
    return fold<kHalf>(sum_lanes_of_each<kCount / 2>(v, step * 2),
                       sum_lanes_of_each<kCount / 2>(v + step, step * 2),
                       std::make_integer_sequence<int, kLanes>{});
  }
}

KVXFER_INLINE float sum_lanes(Vf v) {
  const V4 x = low_quarter_sum(v);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

template <int kStep, int... kLane>
KVXFER_INLINE Vf partners(Vf v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}

// Of the lanes that are kStep, 2 kStep, ... apart the largest, in all of them.
template <int kStep>
KVXFER_INLINE Vf max_of_each(Vf v) {
  if constexpr (kStep < kLanes) {
    v = max_or_second(partners<kStep>(v, std::make_integer_sequence<int, kLanes>{}), v);
    return max_of_each<kStep * 2>(v);
  } else {
    return v;
  }
}

KVXFER_INLINE float max_lanes(Vf v) { return max_of_each<1>(v)[0]; }

KVXFER_INLINE bool all_equal(Vf a, Vf b) {
#if defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff;
#elif defined(KVXFER_SIMD_X86) && KVXFER_SIMD_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff;
#else
  const Vi equal = a == b;
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all = all && equal[i];
  return all;
#endif
}

// 2^x for x <= 127; exactly 1 at 0 and exactly 0 below -126.5, so that a masked key (-inf) weighs
// nothing. Relative error 1e-7: a minimax polynomial of degree 6 (2e-9) on [-0.5, 0.5] and float
// rounding. NaN stays NaN.
KVXFER_INLINE Vf exp2_fast(Vf x) {
  x = max_or_second(splat(-127.0f), x);
  const Vf magic = splat(0x1.8p23f);  // adding it leaves round(x) in the low mantissa bits
  const Vf shifted = x + magic;
  const Vf f = x - (shifted - magic);
  const Vi exponent = (reinterpret_cast<Vi>(shifted) - reinterpret_cast<Vi>(magic) + 127) << 23;
  Vf p = splat(1.534581242594868e-4f);
  p = p * f + 1.3399930903688073e-3f;
  p = p * f + 9.618489071726799e-3f;
  p = p * f + 5.550328642129898e-2f;
  p = p * f + 2.4022646248340607e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<Vf>(exponent);
}

// cap * log2(e) * tanh(s / cap), where y = 2 * log2(e) * s / cap: the caller scales q accordingly.
KVXFER_INLINE Vf soft_cap(Vf y, float cap_log2) {
  const Vf high = splat(60.0f);  // tanh is 1 long before
  const Vf bounded = y > high ? high : y;
  return cap_log2 - (2.0f * cap_log2) / (exp2_fast(bounded) + 1.0f);
}
