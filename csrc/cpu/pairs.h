// The AMX kernel's L and P: tile products for pairs of tokens in different blocks of 4, and the
// factors of rows.
#pragma once

#include "tree.h"

namespace mate {
namespace MATE_ISA {

MATE_INLINE Vec square_root(Vec x) { return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }

// 16 rows of 16 pairs of bf16, transposed.
MATE_INLINE void transpose_pairs(const Bf16* rows, int stride, Bf16* columns, int column_stride) {
  Vec x[16];
  MATE_UNROLL
  for (int i = 0; i < 16; ++i) x[i] = (Vec)_mm512_load_si512(rows + i * stride);
  transpose(x);
  MATE_UNROLL
  for (int i = 0; i < 16; ++i) store_bits(columns + i * column_stride, (__m512i)x[i]);
}

// Rows of keys as B operands.
static void make_columns(Span& span) {
  for (int i = 0; i < 3; ++i) {
    for (int c = 0; c < kDim; c += 32) {
      transpose_pairs(span.left[i][0] + c, kDim, span.left_columns[i][c / 2][0], 32);
    }
  }
}

// k_out transposed, 16 channels.
MATE_INLINE void make_writes(int c, Span& span) {
  for (int part = 0; part < 2; ++part) {
    transpose_pairs(span.k_out_pairs[part][0][c], 2 * kDim, span.write[part][c], kSpan);
  }
}

// x[0] = rows of a times the columns, x[1] = rows of b times them.
MATE_INLINE void multiply(const Bf16 (*a)[kDim], const Bf16 (*b)[kDim],
                          const Bf16 (*columns)[kHalf][2], float (*x)[kHalf][kHalf]) {
  _tile_zero(0);
  _tile_zero(1);
  MATE_UNROLL
  for (int c = 0; c < kDim; c += 32) {
    _tile_loadd(4, a[0] + c, 2 * kDim);
    _tile_loadd(5, b[0] + c, 2 * kDim);
    _tile_loadd(6, columns[c / 2], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, x[0], 64);
  _tile_stored(1, x[1], 64);
}

static void multiply_pairs(Span& span) {
  finish_stores();
  for (int i = 0; i < 2; ++i) {
    multiply(span.right[i][0], span.right[i][1], span.left_columns[i], span.product[i]);
  }
  multiply(span.last_right[0], span.last_right[1], span.left_columns[2], span.product[2]);
}

// L and P inside one half of the span, from blocks of 8 tokens on.
static void fill_half(int half, Span& span) {
  const float (*x)[kHalf][kHalf] = span.product[half];
  const int first = half * kHalf;
  for (int i = 0; i < 8; ++i) {
    const int block = i / 4 * 8, row = first + block + 4 + i % 4;
    __builtin_memcpy(span.L[row] + first + block, x[0][i] + block / 2, 4 * sizeof(float));
    __builtin_memcpy(span.P[row] + first + block, x[0][8 + i] + block / 2, 4 * sizeof(float));
    __builtin_memcpy(span.L[first + 8 + i] + first, x[1][i] + 8, 8 * sizeof(float));
    __builtin_memcpy(span.P[first + 8 + i] + first, x[1][8 + i] + 8, 8 * sizeof(float));
  }
}

// The factors of rows.
static void load_scales(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                        int64_t head, Span& span) {
  load_beta(args, item.batch, token, n, head, span.beta);
  for (int i = n; i < kSpan; ++i) span.beta[i] = 0.0f;
  for (int i = 0; i < kSpan; i += kWidth) {
    Vec key = splat(1.0f), query = key;
    if (args.flags & MATE_L2NORM) {
      key = key / square_root(load(span.k_norm + i) + kNormEps);
      query = query / square_root(load(span.q_norm + i) + kNormEps);
    }
    store(span.output_scale + i, query * args.scale);
    store(span.v_scale + i, key * load(span.beta + i));
    store(span.read_scale + i, key * load(span.beta + i) * key);
  }
}

// L as the solve wants it, P and L's corner as operands.
static void finish_pairs(Span& span) {
  fill_half(0, span);
  fill_half(1, span);
  for (int i = 0; i < kHalf; ++i) {
    const Split x = split(load(span.product[2][0][i]));
    store_bits(span.corner[i], pack(x.high, x.low));
    store_bf16(span.P_rows[i], {load(span.P[i]), Vec{}});
    store_bf16(span.P_rows[kHalf + i],
               {load(span.product[2][1][i]), load(span.P[kHalf + i] + kHalf)});
  }
  for (int i = 0; i < kSpan; ++i) {
    const int block = i / kHalf * kHalf;
    store(span.L[i] + block, load(span.L[i] + block) * -span.read_scale[i]);
  }
}

}  // namespace MATE_ISA
}  // namespace mate
