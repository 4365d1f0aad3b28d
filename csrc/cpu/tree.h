// The AMX kernel's tree of decays, four tokens at a time. What a pair of tokens in different blocks
// of 4 needs is an operand for tile products: it leaves as bf16. See span.h.
#pragma once

#include "span.h"

namespace mate {
namespace MATE_ISA {

// Lane i of the result is the sum of x[i]'s lanes, in memory.
MATE_INLINE void sum_into(float (&sums)[kWidth], Vec (&x)[kWidth]) { store(sums, sum_each(x)); }

// Norms and the diagonal of P.
template <int32_t kDtype>
MATE_INLINE void load_norms(const void* const* q_rows, const void* const* k_rows, int t0,
                            Span& span) {
  alignas(64) float sums[kWidth];
  Vec x[kWidth] = {};
  for (int c = 0; c < kDim; c += 32) {
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecPair q = load_pair<kDtype>(q_rows[i], c), k = load_pair<kDtype>(k_rows[i], c);
      x[i] = x[i] + q.even * q.even;
      x[i] = x[i] + q.odd * q.odd;
      x[4 + i] = x[4 + i] + k.even * k.even;
      x[4 + i] = x[4 + i] + k.odd * k.odd;
      x[8 + i] = x[8 + i] + q.even * k.even;
      x[8 + i] = x[8 + i] + q.odd * k.odd;
    }
  }
  sum_into(sums, x);
  for (int i = 0; i < 4; ++i) {
    span.q_norm[t0 + i] = sums[i];
    span.k_norm[t0 + i] = sums[4 + i];
    span.P[t0 + i][t0 + i] = sums[8 + i];
  }
}

// The two lowest levels: L and P among four tokens, and k_in, q_in and k_out over them.
template <int32_t kDtype>
MATE_INLINE void join_tokens(const void* const* q_rows, const void* const* k_rows, int t0,
                             Span& span) {
  Vec y[kWidth] = {};
  for (int c = 0; c < kDim; c += 32) {
    VecPair q[4], k[4];
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      q[i] = load_pair<kDtype>(q_rows[i], c);
      k[i] = load_pair<kDtype>(k_rows[i], c);
    }
    MATE_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int p = c + part * kWidth;
      Vec e[4], k_in[4], q_in[4], k_out[4];
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        e[i] = load(span.e[t0 + i] + p);
        k_out[i] = part ? k[i].odd : k[i].even;
        k_in[i] = k_out[i] * e[i];
        q_in[i] = (part ? q[i].odd : q[i].even) * e[i];
      }
      MATE_UNROLL
      for (int i = 0; i < 4; i += 2) {  // tokens i, i + 1
        y[i] += k_in[i + 1] * k_out[i];
        y[i + 1] += q_in[i + 1] * k_out[i];
        k_in[i + 1] *= e[i];
        q_in[i + 1] *= e[i];
        k_out[i] *= e[i + 1];
      }
      const Vec first = e[0] * e[1], second = e[2] * e[3];
      MATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        MATE_UNROLL
        for (int j = 0; j < 2; ++j) {
          y[4 + 2 * i + j] += k_in[2 + i] * k_out[j];
          y[8 + 2 * i + j] += q_in[2 + i] * k_out[j];
        }
      }
      MATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        k_in[2 + i] *= first;
        q_in[2 + i] *= first;
        k_out[i] *= second;
      }
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        store(span.k_in[i] + p, k_in[i]);
        store(span.q_in[i] + p, q_in[i]);
        store(span.k_out[i] + p, k_out[i]);
      }
    }
  }
  alignas(64) float sums[kWidth];
  sum_into(sums, y);
  for (int i = 0; i < 4; i += 2) {
    span.L[t0 + i + 1][t0 + i] = sums[i];
    span.P[t0 + i + 1][t0 + i] = sums[i + 1];
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      span.L[t0 + 2 + i][t0 + j] = sums[4 + 2 * i + j];
      span.P[t0 + 2 + i][t0 + j] = sums[8 + 2 * i + j];
    }
  }
}

// k_in and q_in of four tokens through the levels above: where a block of `four`s lies on the
// right, they are operands of L and P, and then decay through the block on the left as well.
MATE_INLINE void store_readers(int four, Span& span) {
  const int half = four / 4, in_half = four % 4;
  Bf16(*right8)[kDim] = span.right[half][0] + four % 4 / 2 * 4;
  Bf16(*right16)[kDim] = span.right[half][1] + four % 2 * 4;
  for (int c = 0; c < kDim; c += 32) {
    for (int i = 0; i < 4; ++i) {
      VecPair k = load_two(span.k_in[i] + c), q = load_two(span.q_in[i] + c);
      if (four % 2) {
        store_bf16(right8[i] + c, k);
        store_bf16(right8[8 + i] + c, q);
        const VecPair e = load_two(span.over4[four - 1] + c);
        k = times(k, e);
        q = times(q, e);
      }
      if (in_half >= 2) {
        store_bf16(right16[i] + c, k);
        store_bf16(right16[8 + i] + c, q);
        const VecPair e = load_two(span.over8[2 * half] + c);
        k = times(k, e);
        q = times(q, e);
      }
      if (half) {
        store_bf16(span.last_right[0][4 * in_half + i] + c, k);
        store_bf16(span.last_right[1][4 * in_half + i] + c, q);
        const VecPair e = load_two(span.over16[0] + c);
        k = times(k, e);
        q = times(q, e);
      }
      store_bf16(span.read[0][4 * four + i] + c, k);
      store_bf16(span.read[1][4 * four + i] + c, q);
    }
  }
}

// Tokens in turns, a and b of the same channel side by side, in two parts. Here, and only here, an
// operand is split: what the rounding of a key writes into the state lies in other keys'
// directions, where no later token corrects it.
MATE_INLINE void store_split_pairs(Bf16* high, Bf16* low, Vec a, Vec b) {
  const Split x = split(a), y = split(b);
  store_bits(high, cut_pairs(x.high, y.high));
  store_bits(low, cut_pairs(x.low, y.low));
}

// The same of k_out, the mirror image: blocks on the left.
MATE_INLINE void store_writers(int four, Span& span) {
  const int half = four / 4, in_half = four % 4;
  Bf16(*left8)[kDim] = span.left[half] + four % 4 / 2 * 4;
  Bf16(*left16)[kDim] = span.left[half] + 8 + four % 2 * 4;
  for (int c = 0; c < kDim; c += 32) {
    VecPair x[4];
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = load_two(span.k_out[i] + c);
      if (four % 2 == 0) {
        store_bf16(left8[i] + c, x[i]);
        x[i] = times(x[i], load_two(span.over4[four + 1] + c));
      }
      if (in_half < 2) {
        store_bf16(left16[i] + c, x[i]);
        x[i] = times(x[i], load_two(span.over8[2 * half + 1] + c));
      }
      if (!half) {
        store_bf16(span.left[2][4 * in_half + i] + c, x[i]);
        x[i] = times(x[i], load_two(span.over16[1] + c));
      }
    }
    MATE_UNROLL
    for (int i = 0; i < 4; i += 2) {
      Bf16(*high)[2] = span.k_out_pairs[0][2 * four + i / 2] + c;
      Bf16(*low)[2] = span.k_out_pairs[1][2 * four + i / 2] + c;
      store_split_pairs(high[0], low[0], x[i].even, x[i + 1].even);
      store_split_pairs(high[kWidth], low[kWidth], x[i].odd, x[i + 1].odd);
    }
  }
}

// Four tokens; those from n on are absent, which rows of zeros make neutral.
template <int32_t kDtype>
static void load_four(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                      int64_t head, int four, Span& span) {
  const int64_t head_qk = head / (args.heads_v / args.heads_qk);
  const void *q_rows[4], *k_rows[4];
  for (int i = 0; i < 4; ++i) {
    const int t = 4 * four + i;
    q_rows[i] =
        t < n ? row(args.q, item.batch, token + t, head_qk) : reinterpret_cast<const char*>(kZeros);
    k_rows[i] =
        t < n ? row(args.k, item.batch, token + t, head_qk) : reinterpret_cast<const char*>(kZeros);
  }
  load_norms<kDtype>(q_rows, k_rows, 4 * four, span);
  join_tokens<kDtype>(q_rows, k_rows, 4 * four, span);
  store_readers(four, span);
  store_writers(four, span);
}

}  // namespace MATE_ISA
}  // namespace mate
