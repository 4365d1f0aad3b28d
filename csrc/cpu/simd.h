// A short vector of kWidth floats and the few functions that the kernels need on it.
//
// Each kernels_<isa>.cpp defines MATE_ISA (the namespace) and MATE_SIMD_WIDTH (floats a vector) and
// compiles this header with its own instruction set. Everything lives in that namespace and nothing
// comes from the C++ library, so that the linker can never hand AVX-512 code to a lesser processor.
#pragma once

#include <stdint.h>

#include <utility>

#include "mate/kda.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MATE_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define MATE_UNROLL _Pragma("unroll")
#else
#define MATE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mate {
namespace MATE_ISA {

constexpr int kWidth = MATE_SIMD_WIDTH;
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));
typedef Vec LooseVec __attribute__((aligned(4), may_alias));  // for memory of any alignment
typedef HalfVec LooseHalfVec __attribute__((aligned(2), may_alias));

MATE_INLINE Vec splat(float x) { return x - Vec{}; }

MATE_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
MATE_INLINE void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }

// ---- 16-bit types ------------------------------------------------------------------------------

MATE_INLINE Vec from_bf16(HalfVec h) { return (Vec)(__builtin_convertvector(h, UintVec) << 16); }

MATE_INLINE HalfVec to_bf16(Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const UintVec nan = (bits >> 16) | 0x40;  // rounding could carry to inf
  return __builtin_convertvector(x != x ? nan : rounded, HalfVec);
}

#if defined(__AVX512F__)  // the masked forms (all lanes) spare a false warning of gcc 12
MATE_INLINE Vec from_fp16(HalfVec h) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
MATE_INLINE HalfVec to_fp16(Vec x) {
  return (HalfVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
MATE_INLINE Vec from_fp16(HalfVec h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
MATE_INLINE HalfVec to_fp16(Vec x) {
  return (HalfVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__)
MATE_INLINE Vec from_fp16(HalfVec h) { return (Vec)vcvt_f32_f16((float16x4_t)h); }
MATE_INLINE HalfVec to_fp16(Vec x) { return (HalfVec)vcvt_f16_f32((float32x4_t)x); }
#else
// Integer arithmetic: exact for denormals whatever the processor's flush mode.
MATE_INLINE Vec from_fp16(HalfVec h) {
  const UintVec half = __builtin_convertvector(h, UintVec);
  const UintVec magnitude = (half & 0x7fff) << 13;
  const UintVec exponent = magnitude & (0x7c00u << 13);
  const UintVec normal = magnitude + (112u << 23);
  const Vec denormal = (Vec)(magnitude + (113u << 23)) - (Vec)(UintVec{} + (113u << 23));
  UintVec bits = exponent == (0x7c00u << 13) ? normal + (112u << 23) : normal;  // inf and NaN
  bits = exponent == 0 ? (UintVec)denormal : bits;
  return (Vec)(bits | ((half & 0x8000) << 16));
}
MATE_INLINE HalfVec to_fp16(Vec x) {
  const UintVec sign = (UintVec)x & 0x80000000u;
  const UintVec bits = (UintVec)x ^ sign;
  const UintVec magic = UintVec{} + (126u << 23);  // its last bit is worth 2^-24, fp16's smallest
  const UintVec denormal = (UintVec)((Vec)bits + (Vec)magic) - magic;
  const UintVec normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const UintVec huge = bits > (255u << 23) ? UintVec{} + 0x7e00 : UintVec{} + 0x7c00;
  UintVec half = bits < (113u << 23) ? denormal : normal;
  half = bits >= (143u << 23) ? huge : half;
  return __builtin_convertvector(half | (sign >> 16), HalfVec);
}
#endif

// Elements index .. index + kWidth of an array of `dtype` (a mate_dtype).
MATE_INLINE Vec load_as(int32_t dtype, const void* p, int64_t index) {
  if (dtype == MATE_FLOAT32) return load(static_cast<const float*>(p) + index);
  const uint16_t* half = static_cast<const uint16_t*>(p) + index;
  const HalfVec h = *reinterpret_cast<const LooseHalfVec*>(half);
  return dtype == MATE_BFLOAT16 ? from_bf16(h) : from_fp16(h);
}
MATE_INLINE void store_as(int32_t dtype, void* p, int64_t index, Vec x) {
  if (dtype == MATE_FLOAT32) return store(static_cast<float*>(p) + index, x);
  uint16_t* half = static_cast<uint16_t*>(p) + index;
  *reinterpret_cast<LooseHalfVec*>(half) = dtype == MATE_BFLOAT16 ? to_bf16(x) : to_fp16(x);
}

// ---- elementary functions ----------------------------------------------------------------------

// x * 2^n, n rounded down (AVX-512) or whole.
MATE_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
#else
  // In two steps: 2^n alone would leave the range before x * 2^n does.
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
  return x * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
#endif
}

// exp(x) = 2^power * (1 + fraction), |fraction| < 0.42.
struct SplitExp {
  Vec power, fraction;
};

MATE_INLINE SplitExp split_exp(Vec x) {
  x = x < -104.0f ? splat(-104.0f) : x;  // comparisons with NaN are false: NaN passes through
  x = x > 89.0f ? splat(89.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + round) - round;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two terms
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {n, p * (r * r) + r};
}

#if defined(__AVX512F__)
alignas(64) constexpr float kRootPowers[32] = {
    // 2^(i / 32)
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f,
    1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
    1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
    1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
    1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f,
};

// 2^(n + i / 32) * 2^r with |r| <= 1 / 64, i's power from a table in two registers: two thirds of a
// polynomial's instructions. Relative error 2e-7; below e^-10 it grows, because x is not reduced in
// two terms, to 1e-6.
MATE_INLINE Vec exp(Vec x) {
  x = (Vec)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-104.0f), (__m512)x);  // NaN passes
  x = (Vec)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(88.0f), (__m512)x);
  const float to_log2 = 1.44269504f, round = 393216.0f;  // 1.5 * 2^18: rounds to multiples of 1/32
  const Vec shifted = x * to_log2 + round, n = shifted - round, r = x * to_log2 - n;
  const Vec power = (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kRootPowers), (__m512i)shifted,
                                                _mm512_load_ps(kRootPowers + kWidth));
  return scale_by_power_of_two((r * 0.240226507f + 0.693157343f) * (r * power) + power, n);
}
#else
MATE_INLINE Vec exp(Vec x) {
  const SplitExp e = split_exp(x);
  return scale_by_power_of_two(e.fraction + 1.0f, e.power);
}
#endif

// exp(x) = whole + part with whole 0 or 1. Multiplying by both keeps decays near 1 exact: rounding
// exp(x) itself would err the same way at every token, and thousands of tokens add that up.
struct Decay {
  Vec whole, part;
};

MATE_INLINE Decay decay(Vec x) {
  const SplitExp e = split_exp(x);
  const Vec full = scale_by_power_of_two(e.fraction + 1.0f, e.power);
  const IntVec near_one = e.power == 0.0f;
  return {near_one ? splat(1.0f) : Vec{}, near_one ? e.fraction : full};
}

// 1 / x for 1 <= x <= 2^127; NaN passes through.
MATE_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // 14 bits, doubled by a Newton step
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

MATE_INLINE Vec sigmoid(Vec x) { return reciprocal(exp(-x) + 1.0f); }

// log(1 + y) for 0 <= y <= 1 as 2 artanh(y / (2 + y)): relative accuracy down to the smallest y.
MATE_INLINE Vec log1p(Vec y) {
  const Vec s = y * reciprocal(y + 2.0f), z = s * s;
  Vec p = z * 0.2322432922f + 0.217065758f;
  p = p * z + 0.2859235799f;
  p = p * z + 0.3999970633f;
  p = p * z + 0.6666666732f;
  return s * z * p + (s + s);
}

MATE_INLINE Vec softplus(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  return (x > 0.0f ? x : Vec{}) + log1p(exp(-magnitude));
}

// ---- moving lanes ------------------------------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MATE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(MATE_SHUFFLE)
#define MATE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// One step of a transpose, at distance D. even: lane l takes a[l], or b[l - D] where l has bit D;
// odd: lane l takes a[l + D], or b[l] where l has bit D.
template <int D, int... L>
MATE_INLINE Vec pick_even(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return MATE_SHUFFLE(a, b, ((L & D) ? kWidth + L - D : L)...);
}
template <int D, int... L>
MATE_INLINE Vec pick_odd(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return MATE_SHUFFLE(a, b, ((L & D) ? kWidth + L : L + D)...);
}
using Lanes = std::make_integer_sequence<int, kWidth>;

template <int D = kWidth / 2>
MATE_INLINE void transpose(Vec (&x)[kWidth]) {
  MATE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i & D) continue;
    const Vec a = x[i], b = x[i + D];
    x[i] = pick_even<D>(a, b, Lanes{});
    x[i + D] = pick_odd<D>(a, b, Lanes{});
  }
  if constexpr (D > 1) transpose<D / 2>(x);
}

// Lane i of the result is the sum of x[i]'s lanes. x is overwritten.
template <int D = kWidth / 2>
MATE_INLINE Vec sum_each(Vec (&x)[kWidth]) {
  MATE_UNROLL
  for (int i = 0; i < D; ++i) {
    x[i] = pick_even<D>(x[i], x[i + D], Lanes{}) + pick_odd<D>(x[i], x[i + D], Lanes{});
  }
  if constexpr (D > 1) return sum_each<D / 2>(x);
  return x[0];
}

template <int D = kWidth / 2>
MATE_INLINE float sum(Vec x) {
  x += pick_odd<D>(x, x, Lanes{});  // the lower lanes hold the sums
  if constexpr (D > 1) return sum<D / 2>(x);
  return x[0];
}

}  // namespace MATE_ISA
}  // namespace mate
