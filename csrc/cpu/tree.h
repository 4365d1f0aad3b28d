// The upper levels of the AMX kernel's tree of decays: tile products make L and P, and k_in, q_in
// and k_out become operands for the products with the state. See span.h.
#pragma once

#include "span.h"

namespace mate {
namespace MATE_ISA {

MATE_INLINE Vec square_root(Vec x) { return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }

MATE_INLINE VecPair load_two(const float* p) { return {load(p), load(p + kWidth)}; }
MATE_INLINE VecPair times(VecPair a, VecPair b) { return {a.even * b.even, a.odd * b.odd}; }
MATE_INLINE void store_bf16(Bf16* p, VecPair x) { store_bits(p, pack(x.even, x.odd)); }

// Makes blocks of 8 tokens out of 4 and 4, after setting aside the operands of L and P between
// these.
static void join_fours(int half, Span& span) {
  for (int block = 0; block < kHalf; block += 8) {
    const int right = block + 4, left = half * kHalf + block, to = block / 2;
    for (int c = 0; c < kDim; c += 32) {
      const VecPair e_left = load_two(span.e[block] + c), e_right = load_two(span.e[right] + c);
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const VecPair k = load_two(span.k_in[right + i] + c),
                      q = load_two(span.q_in[right + i] + c);
        const VecPair out = load_two(span.k_out[left + i] + c);
        store_bf16(span.right[0][to + i] + c, k);
        store_bf16(span.right[0][8 + to + i] + c, q);
        store_bf16(span.left[to + i] + c, out);
        store_pair(span.k_in[right + i] + c, times(k, e_left));
        store_pair(span.q_in[right + i] + c, times(q, e_left));
        store_pair(span.k_out[left + i] + c, times(out, e_right));
      }
      store_pair(span.e[block] + c, times(e_left, e_right));
    }
  }
}

// k_in and q_in of one token as operands. `before`: the first half's decay, for the second half.
MATE_INLINE void store_reads(int half, int i, int c, VecPair k, VecPair q, const float* before,
                             Span& span) {
  if (half == 1) {
    store_bf16(span.last_right[0][i] + c, k);
    store_bf16(span.last_right[1][i] + c, q);
    const VecPair e = load_two(before + c);
    k = times(k, e);
    q = times(q, e);
  }
  const int row = half * kHalf + i;
  store_bf16(span.read[0][row] + c, k);
  store_bf16(span.read[1][row] + c, q);
}

// The same for blocks of 8 and 8 tokens, which completes k_in and q_in of this half.
template <int kWhich>
static void join_eights(const float* before, Span& span) {
  const int first = kWhich * kHalf;
  for (int c = 0; c < kDim; c += 32) {
    const VecPair e_left = load_two(span.e[0] + c), e_right = load_two(span.e[8] + c);
    for (int i = 0; i < 8; ++i) {
      const VecPair out = load_two(span.k_out[first + i] + c);
      store_bf16(span.left[8 + i] + c, out);
      const VecPair after = times(out, e_right);
      store_pair(span.k_out[first + i] + c, after);
      if (kWhich == 0) {
        store_bf16(span.last_left[i] + c, after);
        store_bf16(span.last_left[8 + i] + c, load_two(span.k_out[8 + i] + c));
      }
      store_reads(kWhich, i, c, load_two(span.k_in[i] + c), load_two(span.q_in[i] + c), before,
                  span);
      const VecPair k = load_two(span.k_in[8 + i] + c), q = load_two(span.q_in[8 + i] + c);
      store_bf16(span.right[1][i] + c, k);
      store_bf16(span.right[1][8 + i] + c, q);
      store_reads(kWhich, 8 + i, c, times(k, e_left), times(q, e_left), before, span);
    }
    store_pair(span.e[0] + c, times(e_left, e_right));
  }
}

// k_out transposed, the first half's rows also decayed through the second half. Here, and only
// here, an operand is split into two: what the rounding of a key writes into the state lies in
// other keys' directions, where no later token corrects it.
static void finish_writes(const float* second, Span& span) {
  for (int c = 0; c < kDim; c += kWidth) {
    const Vec after = load(second + c);
    __m512i high[16], low[16];
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) {
      Vec a = load(span.k_out[2 * i] + c), b = load(span.k_out[2 * i + 1] + c);
      if (i < 8) {
        a *= after;
        b *= after;
      }
      const Split x = split(a), y = split(b);
      high[i] = pack_pairs(x.high, y.high);
      low[i] = pack_pairs(x.low, y.low);
    }
    transpose_pairs(high);
    transpose_pairs(low);
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) {
      store_bits(span.write[0][c + i], high[i]);
      store_bits(span.write[1][c + i], low[i]);
    }
  }
}

// Rows of keys as a B operand.
static void make_columns(const Bf16 (*rows)[kDim], Bf16 (*columns)[kHalf][2]) {
  for (int c = 0; c < kDim; c += 32) {
    __m512i x[16];
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(rows[i] + c);
    transpose_pairs(x);
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) store_bits(columns[c / 2 + i][0], x[i]);
  }
}

// x[0] = rows of a times the columns, x[1] = rows of b times them.
MATE_INLINE void multiply(const Bf16 (*a)[kDim], const Bf16 (*b)[kDim],
                          const Bf16 (*columns)[kHalf][2], float (*x)[kHalf][kHalf]) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
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

// L and P inside one half of the span, from blocks of 8 tokens on.
static void fill_half(int half, Span& span) {
  alignas(64) float x[2][kHalf][kHalf];
  multiply(span.right[0], span.right[1], span.left_columns, x);
  const int first = half * kHalf;
  for (int i = 0; i < 8; ++i) {
    const int block = i / 4 * 8, row = first + block + 4 + i % 4;
    __builtin_memcpy(span.L[row] + first + block, x[0][i] + block / 2, 4 * sizeof(float));
    __builtin_memcpy(span.P[row] + first + block, x[0][8 + i] + block / 2, 4 * sizeof(float));
    __builtin_memcpy(span.L[first + 8 + i] + first, x[1][i] + 8, 8 * sizeof(float));
    __builtin_memcpy(span.P[first + 8 + i] + first, x[1][8 + i] + 8, 8 * sizeof(float));
  }
}

// L and P between the span's halves.
static void fill_corner(Span& span) {
  alignas(64) float x[2][kHalf][kHalf];
  multiply(span.last_right[0], span.last_right[1], span.last_left_columns, x);
  for (int i = 0; i < kHalf; ++i) {
    store(span.L[kHalf + i], load(x[0][i]));
    store(span.P[kHalf + i], load(x[1][i]));
  }
}

// The factors of rows, L as the solve wants it, P and L's corner as operands.
static void finish_LP(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
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
  for (int i = 0; i < kHalf; ++i) {
    const Split x = split(load(span.L[kHalf + i]));
    store_bits(span.corner[i], pack(x.high, x.low));
  }
  for (int i = 0; i < kSpan; ++i) {
    store_bf16(span.P_rows[i], load_two(span.P[i]));
    const int block = i / kHalf * kHalf;
    store(span.L[i] + block, load(span.L[i] + block) * -span.read_scale[i]);
  }
}

// Everything up to the products with the state, for tokens [token, token + n).
static void load_span(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                      int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  alignas(64) float first[kDim];  // the first half's decay
  __builtin_memset(span.total, 0, sizeof(span.total));
  for (int half = 0; half < 2; ++half) {
    const int64_t start = token + half * kHalf;
    const int left = n - half * kHalf, count = left < 0 ? 0 : left < kHalf ? left : kHalf;
    load_gates(args, item, gate, start, count, head, later, span);
    if (half == 1) fill_half(0, span);  // not earlier: its operands must first reach the cache
    if (args.q.dtype == MATE_BFLOAT16) {
      load_fours<MATE_BFLOAT16>(args, item, start, count, head, half, later, span);
    } else {
      load_fours<MATE_FLOAT16>(args, item, start, count, head, half, later, span);
    }
    join_fours(half, span);
    if (half == 0) {
      join_eights<0>(nullptr, span);
      __builtin_memcpy(first, span.e[0], sizeof(first));
      make_columns(span.last_left, span.last_left_columns);
    } else {
      join_eights<1>(first, span);
    }
    make_columns(span.left, span.left_columns);
  }
  finish_writes(span.e[0], span);
  fill_half(1, span);
  fill_corner(span);
  finish_LP(args, item, token, n, head, span);
  for (int c = 0; c < kDim; c += kWidth) store(span.decay + c, exp(load(span.total + c)));
}

}  // namespace MATE_ISA
}  // namespace mate
