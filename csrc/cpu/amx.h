// What the AMX kernel needs from the processor: tile registers, bfloat16 packing, transposes.
//
// A tile register holds 16 rows of 64 bytes. Here the products are always of full registers:
//   C[16][16] floats += A[16][32] bf16 * B[16][16][2] bf16,   B[r][n] = {row 2r, row 2r + 1} at n.
// The intrinsics take register numbers as literals, so that none of this can be a loop or a
// function of the number. By convention 0-3 accumulate, 4-5 hold A and 6-7 hold B.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace mate {
namespace MATE_ISA {

typedef uint16_t Bf16;  // only moved and multiplied: never computed with

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers are this thread's between construction and destruction; releasing them spares
// the operating system 8 KB at every later switch to another thread.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~TileRegisters() { _tile_release(); }
};

// gcc 12 does not know that tile loads read memory: this makes it finish its stores before.
MATE_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

#define MATE_TILE_ZERO_4() \
  do {                     \
    _tile_zero(0);         \
    _tile_zero(1);         \
    _tile_zero(2);         \
    _tile_zero(3);         \
  } while (0)

// The accumulators as a 2 x 2 block: {0, 1; 2, 3} += {4; 5} * {6, 7}.
#define MATE_TILE_PRODUCTS_2X2() \
  do {                           \
    _tile_dpbf16ps(0, 4, 6);     \
    _tile_dpbf16ps(1, 4, 7);     \
    _tile_dpbf16ps(2, 5, 6);     \
    _tile_dpbf16ps(3, 5, 7);     \
  } while (0)

// ---- bfloat16 -----------------------------------------------------------------------------------

// 32 bf16 numbers, lo's before hi's; rounds to nearest even.
MATE_INLINE __m512i pack(Vec lo, Vec hi) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo);
}

// The same, taking turns: lo[0], hi[0], lo[1], hi[1] ... One row of a B operand.
MATE_INLINE __m512i pack_pairs(Vec lo, Vec hi) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(turns, pack(lo, hi));
}

// pack_pairs of numbers that are rounded towards zero.
MATE_INLINE __m512i cut_pairs(Vec lo, Vec hi) {
  return (__m512i)(((UintVec)lo >> 16) | ((UintVec)hi & 0xffff0000u));
}

// x = high + low, where high is a bf16 number: two bf16 operands instead of one keep 16 bits.
struct Split {
  Vec high, low;
};

MATE_INLINE Split split(Vec x) {
  const Vec high = (Vec)((UintVec)x & 0xffff0000u);
  return {high, x - high};
}

// NaNs with the highest payloads would overflow to numbers in products.h's store_rows; those that
// 16-bit inputs make do not.
MATE_INLINE Vec plain_nan(Vec x) { return x != x ? splat(__builtin_nanf("")) : x; }

MATE_INLINE void store_bits(Bf16* p, __m512i x) { _mm512_store_si512(p, x); }

}  // namespace MATE_ISA
}  // namespace mate
