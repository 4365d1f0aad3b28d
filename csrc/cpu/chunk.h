// The chunked forward: 16 tokens at a time, everything in fp32, right for any decay.
//
// With e_t = exp(a_t) per key channel, every decay between two tokens is a product of e's, and
// no factor ever exceeds 1: nothing overflows, and underflow (a = -inf included) is harmless.
#pragma once

#include "rows.h"

namespace mate {
namespace MATE_ISA {

constexpr int kPanel = 2 * kWidth;  // value channels handled together
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;  // 8 x 2 accumulators need 32 registers
#else
constexpr int kRows = 4;
#endif

struct Tile {
  alignas(64) float k_in[kTile][kDim];  // k_i * prod e over the block's tokens up to and with i
  float q_in[kTile][kDim];              // the same of scale * q_i; follows k_in: 32 rows
  float k_out[kTile][kDim];             // k_i * prod e over the block's tokens after i
  float e[kTile][kDim];                 // prod e over the block, in the row of its first token
  float whole[kDim], part[kDim];        // the decay over the tile, see simd.h
  float L[kTile][kTile];                // i > j: <k_i decayed from j to i, k_j>
  float P[kTile][kTile];                // i >= j: scale * <q_i decayed from j to i, k_j>
  float read[2 * kTile][kPanel];        // k_in S, then q_in S
  float u[kTile][kPanel];               // what the delta rule writes
  float beta[kTile];
};

// Loads n tokens; blocks of one token: k_in = k e, k_out = k.
static void load_tile(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                      int64_t token, int n, int64_t head, Tile& tile) {
  Vec total[kDim / kWidth] = {};
  for (int i = 0; i < n; ++i) {
    float *q = tile.q_in[i], *k_in = tile.k_in[i], *k_out = tile.k_out[i], *e = tile.e[i];
    const TokenScales scales = load_qk(args, item.batch, token + i, head, q, k_out);
    tile.P[i][i] = scales.q_dot_k;
    const char* g = row(args.g, item.batch, token + i, head);
    for (int c = 0; c < kDim; c += kWidth) {
      const Vec a = log_decay(gate, load_as(args.g.dtype, g, c), c);
      total[c / kWidth] += a;
      const Vec factor = exp(a), k = load(k_out + c) * scales.k;
      store(e + c, factor);
      store(k_out + c, k);
      store(k_in + c, k * factor);
      store(q + c, load(q + c) * scales.q * factor);
    }
  }
  for (int i = n; i < kTile; ++i) {  // absent tokens are neutral
    for (int c = 0; c < kDim; ++c) {
      tile.k_in[i][c] = tile.q_in[i][c] = tile.k_out[i][c] = 0.0f;
      tile.e[i][c] = 1.0f;
    }
  }
  for (int c = 0; c < kDim; c += kWidth) {
    const Decay d = decay(total[c / kWidth]);
    store(tile.whole + c, d.whole);
    store(tile.part + c, d.part);
  }
  load_beta(args, item.batch, token, n, head, tile.beta);
}

// out[i][j] = <rows[i], columns[j]> for R rows and C columns of 128 channels.
template <int R, int C>
MATE_INLINE void dots(const float (*rows)[kDim], const float (*columns)[kDim],
                      float (*out)[kTile]) {
  static_assert(R * C <= kWidth, "one lane a product");
  Vec x[kWidth] = {};
  for (int c = 0; c < kDim; c += kWidth) {
    MATE_UNROLL
    for (int i = 0; i < R; ++i) {
      MATE_UNROLL
      for (int j = 0; j < C; ++j) x[i * C + j] += load(rows[i] + c) * load(columns[j] + c);
    }
  }
  const Vec sums = sum_each(x);
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) out[i][j] = sums[i * C + j];
  }
}

template <int R, int C>
MATE_INLINE void fill_LP(Tile& tile, int i, int j) {
  dots<R, C>(tile.k_in + i, tile.k_out + j, reinterpret_cast<float (*)[kTile]>(&tile.L[i][j]));
  dots<R, C>(tile.q_in + i, tile.k_out + j, reinterpret_cast<float (*)[kTile]>(&tile.P[i][j]));
}

// L and P between the halves of one block of 2 * half tokens: rows from the right half, whose
// factors start where the left half's end. A decay from j to i is k_out's part times k_in's.
MATE_INLINE void fill_LP_between(Tile& tile, int left, int half) {
  const int right = left + half;
  if (half == 1) return fill_LP<1, 1>(tile, right, left);
  if (half == 2) return fill_LP<2, 2>(tile, right, left);
  for (int i = 0; i < half; i += kWidth / 4) {
    for (int j = 0; j < half; j += 4) fill_LP<kWidth / 4, 4>(tile, right + i, left + j);
  }
}

// Makes one block of two neighbours: rows on the right also decay through the left half, and what
// the left half writes also decays through the right one.
MATE_INLINE void join_blocks(Tile& tile, int left, int half) {
  const int right = left + half;
  for (int c = 0; c < kDim; c += kWidth) {
    const Vec e_left = load(tile.e[left] + c), e_right = load(tile.e[right] + c);
    for (int i = 0; i < half; ++i) {
      store(tile.k_in[right + i] + c, load(tile.k_in[right + i] + c) * e_left);
      store(tile.q_in[right + i] + c, load(tile.q_in[right + i] + c) * e_left);
      store(tile.k_out[left + i] + c, load(tile.k_out[left + i] + c) * e_right);
    }
    store(tile.e[left] + c, e_left * e_right);
  }
}

// L and P, and k_in, q_in, k_out for the whole tile, by a binary tree over its tokens.
static void build_tile(Tile& tile, int n) {
  for (int half = 1; half < kTile; half *= 2) {
    for (int left = 0; left + half < n; left += 2 * half) {
      fill_LP_between(tile, left, half);
      join_blocks(tile, left, half);
    }
  }
}

// read = rows S for kRows rows of 128 channels and one panel of the state, [128][kPanel].
MATE_INLINE void read_state(const float (*rows)[kDim], const float* panel, float (*out)[kPanel]) {
  Vec x[kRows][2] = {};
  for (int c = 0; c < kDim; ++c) {
    const Vec s0 = load(panel + c * kPanel), s1 = load(panel + c * kPanel + kWidth);
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      x[i][0] += rows[i][c] * s0;
      x[i][1] += rows[i][c] * s1;
    }
  }
  MATE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    store(out[i], x[i][0]);
    store(out[i] + kWidth, x[i][1]);
  }
}

// S <- Diag(decay over the tile) S + k_out^T u, one panel.
MATE_INLINE void update_state(const Tile& tile, int n, float* panel) {
  for (int c = 0; c < kDim; c += kRows) {
    Vec s[kRows][2];
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float *p = panel + (c + i) * kPanel, whole = tile.whole[c + i], part = tile.part[c + i];
      s[i][0] = load(p) * whole + load(p) * part;
      s[i][1] = load(p + kWidth) * whole + load(p + kWidth) * part;
    }
    for (int t = 0; t < n; ++t) {
      const Vec u0 = load(tile.u[t]), u1 = load(tile.u[t] + kWidth);
      MATE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        s[i][0] += tile.k_out[t][c + i] * u0;
        s[i][1] += tile.k_out[t][c + i] * u1;
      }
    }
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      store(panel + (c + i) * kPanel, s[i][0]);
      store(panel + (c + i) * kPanel + kWidth, s[i][1]);
    }
  }
}

// u_i = b_i (v_i - (k_in S)_i - sum_{j < i} L_ij u_j) for rows i0 .. i0 + kRows, by forward
// substitution on the right-hand side: keys that are all alike cost no accuracy, as an inverse
// would.
MATE_INLINE void solve_rows(Tile& tile, int i0) {
  Vec x[kRows][2];
  MATE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    x[i][0] = load(tile.u[i0 + i]) - load(tile.read[i0 + i]);
    x[i][1] = load(tile.u[i0 + i] + kWidth) - load(tile.read[i0 + i] + kWidth);
  }
  for (int j = 0; j < i0; ++j) {
    const Vec u0 = load(tile.u[j]), u1 = load(tile.u[j] + kWidth);
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      x[i][0] -= tile.L[i0 + i][j] * u0;
      x[i][1] -= tile.L[i0 + i][j] * u1;
    }
  }
  MATE_UNROLL
  for (int j = 0; j < kRows; ++j) {
    x[j][0] *= tile.beta[i0 + j];
    x[j][1] *= tile.beta[i0 + j];
    store(tile.u[i0 + j], x[j][0]);
    store(tile.u[i0 + j] + kWidth, x[j][1]);
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i <= j) continue;
      x[i][0] -= tile.L[i0 + i][i0 + j] * x[j][0];
      x[i][1] -= tile.L[i0 + i][i0 + j] * x[j][1];
    }
  }
}

// o_i = (q_in S)_i + sum_{j <= i} P_ij u_j, over the same rows, into tile.read.
MATE_INLINE void output_rows(Tile& tile, int i0) {
  float (*o)[kPanel] = tile.read + kTile + i0;
  Vec x[kRows][2];
  MATE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    x[i][0] = load(o[i]);
    x[i][1] = load(o[i] + kWidth);
  }
  for (int j = 0; j < i0; ++j) {
    const Vec u0 = load(tile.u[j]), u1 = load(tile.u[j] + kWidth);
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      x[i][0] += tile.P[i0 + i][j] * u0;
      x[i][1] += tile.P[i0 + i][j] * u1;
    }
  }
  MATE_UNROLL
  for (int j = 0; j < kRows; ++j) {
    const Vec u0 = load(tile.u[i0 + j]), u1 = load(tile.u[i0 + j] + kWidth);
    MATE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i < j) continue;  // not a product with zero: a NaN must not reach earlier tokens
      x[i][0] += tile.P[i0 + i][i0 + j] * u0;
      x[i][1] += tile.P[i0 + i][i0 + j] * u1;
    }
  }
  MATE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    store(o[i], x[i][0]);
    store(o[i] + kWidth, x[i][1]);
  }
}

// One panel of value channels: reads v, writes o, moves the state on by n tokens.
static void run_panel(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                      int64_t head, int column, Tile& tile, float* panel) {
  for (int i = 0; i < n; ++i) {
    const char* v = row(args.v, item.batch, token + i, head);
    store(tile.u[i], load_as(args.v.dtype, v, column));
    store(tile.u[i] + kWidth, load_as(args.v.dtype, v, column + kWidth));
  }
  for (int i = n; i < kTile; ++i) {
    store(tile.u[i], Vec{});
    store(tile.u[i] + kWidth, Vec{});
  }
  for (int i0 = 0; i0 < n; i0 += kRows) {
    read_state(tile.k_in + i0, panel, tile.read + i0);
    read_state(tile.q_in + i0, panel, tile.read + kTile + i0);
    solve_rows(tile, i0);
    output_rows(tile, i0);
  }
  for (int i = 0; i < n; ++i) {
    char* o = row(args.output, item.batch, token + i, head);
    const float* x = tile.read[kTile + i];
    store_as(args.output.dtype, o, column, load(x));
    store_as(args.output.dtype, o, column + kWidth, load(x + kWidth));
  }
  update_state(tile, n, panel);
}

// The caller's state <-> panels [columns / kPanel][128][kPanel].
static void load_panels(const mate_kda_args& args, const WorkItem& item, int64_t head, float* out) {
  for (int column = item.column_begin; column < item.column_end; column += kPanel) {
    const Block panel = {out, MATE_FLOAT32, kPanel};
    out += kDim * kPanel;
    if (has_state(args.initial_state, item)) {
      const Block from = state_block(args, args.initial_state, item, head, column);
      copy_block(from, panel, kDim, kPanel, args.flags & MATE_STATE_V_FIRST);
    } else {
      __builtin_memset(panel.data, 0, sizeof(float) * kDim * kPanel);
    }
  }
}

static void store_panels(const mate_kda_args& args, const WorkItem& item, int64_t head, float* in) {
  if (!has_state(args.final_state, item)) return;
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  for (int column = item.column_begin; column < item.column_end; column += kPanel) {
    const Block panel = {in, MATE_FLOAT32, kPanel};
    const Block to = state_block(args, args.final_state, item, head, column);
    copy_block(panel, to, v_first ? kPanel : kDim, v_first ? kDim : kPanel, v_first);
    in += kDim * kPanel;
  }
}

// Inline, because gcc takes a function that only prefetches for one without effect and drops it.
template <int kWrite>
MATE_INLINE void prefetch_row(const mate_tensor& x, int64_t batch, int64_t token, int64_t head) {
  const char* p = row(x, batch, token, head);
  for (int i = 0; i < kDim * element_size(x.dtype); i += 64) __builtin_prefetch(p + i, kWrite);
}

// Asks for a token's rows before load_tile and run_panel read and write them: they lie on a page
// each, which the processor does not foresee by itself. Worth a quarter of the time with fp32
// inputs.
MATE_INLINE void prefetch_token(const mate_kda_args& args, int64_t batch, int64_t token,
                                int64_t head) {
  const int64_t head_qk = head / (args.heads_v / args.heads_qk);
  prefetch_row<0>(args.q, batch, token, head_qk);
  prefetch_row<0>(args.k, batch, token, head_qk);
  prefetch_row<0>(args.g, batch, token, head);
  prefetch_row<0>(args.v, batch, token, head);
  prefetch_row<1>(args.output, batch, token, head);
}

// Time outside, heads inside: one head's rows lie kilobytes apart, its neighbours' are adjacent.
static void run_chunked(const mate_kda_args& args, const WorkItem& item, float* states) {
  Tile tile;
  __builtin_memset(&tile, 0, sizeof(tile));
  const int columns = item.column_end - item.column_begin;
  const int64_t state_size = static_cast<int64_t>(kDim) * columns;
  HeadGate gates[kMaxHeads];
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    gates[h - item.head_begin] = head_gate(args, h);
    load_panels(args, item, h, states + (h - item.head_begin) * state_size);
  }
  for (int64_t t = item.begin; t < item.end; t += kTile) {
    const int n = item.end - t < kTile ? static_cast<int>(item.end - t) : kTile;
    for (int64_t h = item.head_begin; h < item.head_end; ++h) {
      load_tile(args, item, gates[h - item.head_begin], t, n, h, tile);
      build_tile(tile, n);
      // Between panels, fetch a share of the rows of the next head, or of the first at the next
      // tile.
      const bool last_head = h + 1 == item.head_end;
      const int64_t next_head = last_head ? item.head_begin : h + 1;
      int64_t next_token = last_head ? t + kTile : t;
      const int64_t next_end = next_token + kTile < item.end ? next_token + kTile : item.end;
      float* panel = states + (h - item.head_begin) * state_size;
      for (int column = item.column_begin; column < item.column_end; column += kPanel) {
        for (int i = 0; i < kTile * kPanel / columns && next_token < next_end; ++i) {
          prefetch_token(args, item.batch, next_token++, next_head);
        }
        run_panel(args, item, t, n, h, column, tile, panel);
        panel += kDim * kPanel;
      }
    }
  }
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    store_panels(args, item, h, states + (h - item.head_begin) * state_size);
  }
}

}  // namespace MATE_ISA
}  // namespace mate
