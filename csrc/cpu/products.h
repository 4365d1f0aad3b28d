// The AMX kernel's products with the state, whose columns of V never mix: panels of 32 of them.
#pragma once

#include "span.h"

namespace mate {
namespace MATE_ISA {

constexpr int kPanel = 32;  // value channels: two tile registers wide

// A head's state between spans: fp32 numbers in two halves, which is less to move than fp32 numbers
// and a bf16 copy. Their bits plus 0x8000 are cut in two: the upper half is the number rounded to
// bf16, the operand for reading. Both are [K / 2][V][2], keys' channels in storage order.
struct State {
  Bf16* high;
  uint16_t* low;
  int columns;  // of V
};

struct VecTwo {
  Vec a, b;  // rows 2 i and 2 i + 1
};

MATE_INLINE VecTwo load_rows(const Bf16* high, const uint16_t* low) {
  const __m512i h = _mm512_load_si512(high), l = _mm512_load_si512(low);
  const __mmask32 odd = 0xaaaaaaaa;
  const UintVec a = (UintVec)_mm512_mask_blend_epi16(odd, l, (__m512i)((UintVec)h << 16));
  const UintVec b = (UintVec)_mm512_mask_blend_epi16(odd, (__m512i)((UintVec)l >> 16), h);
  return {(Vec)(a - 0x8000u), (Vec)(b - 0x8000u)};
}

MATE_INLINE void store_rows(Bf16* high, uint16_t* low, VecTwo x) {
  const UintVec a = (UintVec)x.a + 0x8000u, b = (UintVec)x.b + 0x8000u;
  const __mmask32 odd = 0xaaaaaaaa;
  store_bits(high, _mm512_mask_blend_epi16(odd, (__m512i)(a >> 16), (__m512i)b));
  store_bits(low, _mm512_mask_blend_epi16(odd, (__m512i)a, (__m512i)(b << 16)));
}

// One panel's reads.
struct Panel {
  alignas(64) float reads[kSpan][kPanel];  // k_in S, then the output
  float last[kPanel];                      // w of the last token
};

struct Work {
  Panel panels[2];
  // w, tokens in pairs; the first half's again instead of the second's, see carry_over.
  alignas(64) Bf16 w_pairs[kDim / 16][kHalf][16][2];
  float product[2][2][16][16];  // k_out^T w, 16 rows and a panel of it
};

// Accumulators = 32 rows times the panel's state.
MATE_INLINE void read_state(const Bf16 (*rows)[kDim], const State& state, int column) {
  MATE_TILE_ZERO_4();
  MATE_UNROLL
  for (int c = 0; c < kDim; c += 32) {
    _tile_loadd(4, rows[0] + c, 2 * kDim);
    _tile_loadd(5, rows[16] + c, 2 * kDim);
    const Bf16* panel = state.high + c * state.columns + 2 * column;
    _tile_loadd(6, panel, 4 * state.columns);
    _tile_loadd(7, panel + 32, 4 * state.columns);
    MATE_TILE_PRODUCTS_2X2();
  }
}

MATE_INLINE void store_reads(Panel& panel) {
  _tile_stored(0, panel.reads[0], 4 * kPanel);
  _tile_stored(1, panel.reads[0] + 16, 4 * kPanel);
  _tile_stored(2, panel.reads[16], 4 * kPanel);
  _tile_stored(3, panel.reads[16] + 16, 4 * kPanel);
}

// w_i = v_scale v_i - read_scale (reads_i + sum_{j < i} L_ij w_j) for half a span and one vector of
// columns: forward substitution on the right-hand side. L has its factor already.
template <int32_t kDtype>
MATE_INLINE void solve_columns(const Span& span, int half, const void* const* v, int v_column,
                               int part, Panel& panel, Bf16 (*pairs)[16][2]) {
  const int first = half * kHalf;
  Vec x[kHalf];
  MATE_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    x[i] = load_as(kDtype, v[first + i], v_column) * span.v_scale[first + i] -
           load(panel.reads[first + i] + part * kWidth) * span.read_scale[first + i];
  }
  MATE_UNROLL
  for (int j = 0; j < kHalf; ++j) {
    MATE_UNROLL
    for (int i = j + 1; i < kHalf; ++i) x[i] += span.L[first + i][first + j] * x[j];
    if (j % 2 == 0) continue;
    const __m512i pair = pack_pairs(x[j - 1], x[j]);
    store_bits(pairs[(first + j) / 2][0], pair);
    if (half == 0) store_bits(pairs[(kHalf + j) / 2][0], pair);  // see carry_over
  }
  if (half == 1) store(panel.last + part * kWidth, x[kHalf - 1]);
}

template <int32_t kDtype>
MATE_INLINE void solve(const Span& span, int half, const void* const* v, int v_column, Panel& panel,
                       Bf16 (*pairs)[kHalf][16][2]) {
  for (int part = 0; part < 2; ++part) {
    solve_columns<kDtype>(span, half, v, v_column + part * kWidth, part, panel, pairs[part]);
  }
  finish_stores();
}

// reads += corner w: what the first half wrote reaches the second half's reads. The operand holds
// the first half twice, for the corner's high part and its low part.
MATE_INLINE void carry_over(const Span& span, Panel& panel, const Bf16 (*w)[kHalf][16][2]) {
  _tile_loadd(0, panel.reads[kHalf], 4 * kPanel);
  _tile_loadd(1, panel.reads[kHalf] + 16, 4 * kPanel);
  _tile_loadd(4, span.corner, 64);
  _tile_loadd(6, w[0], 64);
  _tile_loadd(7, w[1], 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stored(0, panel.reads[kHalf], 4 * kPanel);
  _tile_stored(1, panel.reads[kHalf] + 16, 4 * kPanel);
}

// A number that is not finite reaches every later token of its channel: the last one tells.
MATE_INLINE bool all_finite(const Panel& panel) {
  const Vec x = load(panel.last) + load(panel.last + kWidth);
  return _mm512_cmp_ps_mask((__m512)(x - x), (__m512)Vec{}, _CMP_EQ_OQ) == 0xffff;
}

MATE_INLINE float widened(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// P's zeros above the diagonal times a NaN would be NaN, which must not reach earlier tokens. So
// where w is not finite, zeros take its place in the product, and this adds what is missing.
static void add_not_finite(const Span& span, const Bf16 (*pairs)[kHalf][16][2], Panel& panel) {
  for (int j = 0; j < kSpan; ++j) {
    for (int c = 0; c < kPanel; ++c) {
      const float w = widened(pairs[c / 16][j / 2][c % 16][j % 2]);
      if (w - w == 0.0f) continue;
      for (int i = j; i < kSpan; ++i) panel.reads[i][c] += span.P[i][j] * w;
    }
  }
}

static void copy_finite(const Bf16 (*from)[kHalf][16][2], Bf16 (*to)[kHalf][16][2]) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);  // all ones: an infinity or NaN
  for (int part = 0; part < 2; ++part) {
    for (int i = 0; i < kHalf; ++i) {
      const __m512i x = _mm512_load_si512(from[part][i]);
      const __mmask32 finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      store_bits(to[part][i][0], _mm512_maskz_mov_epi16(finite, x));
    }
  }
}

// reads = q_in S + P w.
MATE_INLINE void make_output(const Span& span, const State& state, int column,
                             const Bf16 (*pairs)[kHalf][16][2], Panel& panel) {
  const bool finite = all_finite(panel);
  const Bf16(*w)[kHalf][16][2] = pairs;
  alignas(64) Bf16 finite_w[2][kHalf][16][2];
  if (!finite) {
    copy_finite(w, finite_w);
    w = finite_w;
    finish_stores();
  }
  read_state(span.read[1], state, column);
  _tile_loadd(6, w[0], 64);
  _tile_loadd(7, w[1], 64);
  _tile_loadd(4, span.P_rows[0], 64);
  _tile_loadd(5, span.P_rows[kHalf], 64);
  MATE_TILE_PRODUCTS_2X2();
  store_reads(panel);
  if (!finite) add_not_finite(span, pairs, panel);
}

MATE_INLINE void store_output(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                              int64_t head, int column, const Span& span, const Panel& panel) {
  for (int i = 0; i < n; ++i) {
    char* o = row(args.output, item.batch, token + i, head);
    const float scale = span.output_scale[i];
    const Vec a = load(panel.reads[i]) * scale, b = load(panel.reads[i] + kWidth) * scale;
    if (args.output.dtype == MATE_BFLOAT16) {
      _mm512_storeu_si512(reinterpret_cast<Bf16*>(o) + column, pack(a, b));
    } else {
      store_as(args.output.dtype, o, column, a);
      store_as(args.output.dtype, o, column + kWidth, b);
    }
  }
}

// The panels' reads. While the vector unit solves one, the tile unit reads the state for the next.
template <int32_t kDtype>
static void run_panels(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                       int64_t head, const State& state, const Span& span, Work& work,
                       LaterRows& later) {
  const void* v[kSpan];
  for (int i = 0; i < kSpan; ++i) {
    v[i] = i < n ? row(args.v, item.batch, token + i, head) : reinterpret_cast<const char*>(kZeros);
  }
  finish_stores();
  for (int c = -kPanel; c < state.columns; c += kPanel) {
    const int next = c + kPanel, turn = c / kPanel & 1;
    const bool has_next = next < state.columns;
    Panel &panel = work.panels[turn], &next_panel = work.panels[1 - turn];
    Bf16(*w)[kHalf][16][2] = work.w_pairs + c / 16, (*next_w)[kHalf][16][2] = w + 2;
    if (has_next) {
      read_state(span.read[0], state, next);
      store_reads(next_panel);
    }
    if (c >= 0) {
      solve<kDtype>(span, 1, v, item.column_begin + c, panel, w);
      make_output(span, state, c, w, panel);
      later.fetch();
    }
    if (has_next) {
      solve<kDtype>(span, 0, v, item.column_begin + next, next_panel, next_w);
      carry_over(span, next_panel, next_w);
      later.fetch();
    }
    if (c >= 0) store_output(args, item, token, n, head, item.column_begin + c, span, panel);
  }
}

// S <- Diag(decay) S + product for 16 channels of keys and one panel.
MATE_INLINE void add_product(const Span& span, const State& state, int first, int column,
                             const float (*product)[16][16]) {
  MATE_UNROLL
  for (int i = 0; i < 16; i += 2) {
    const int at = (first + i) * state.columns + 2 * column;
    MATE_UNROLL
    for (int p = 0; p < 2; ++p) {
      Bf16* high = state.high + at + 32 * p;
      uint16_t* low = state.low + at + 32 * p;
      const VecTwo s = load_rows(high, low);
      store_rows(high, low,
                 {s.a * span.decay[first + i] + load(product[p][i]),
                  s.b * span.decay[first + i + 1] + load(product[p][i + 1])});
    }
  }
}

// S <- Diag(decay) S + k_out^T w. Each product is made while the one before is added.
MATE_INLINE void update_state(const Span& span, const State& state, Work& work, LaterRows& later) {
  int turn = 0, first = 0, column = -1;
  for (int c = 0; c < kDim; c += 16) {
    later.fetch();
    for (int i = 0; i < state.columns; i += kPanel) {
      _tile_loadd(4, span.write[0][c], 64);
      _tile_loadd(5, span.write[1][c], 64);
      _tile_loadd(6, work.w_pairs[i / 16], 64);
      _tile_loadd(7, work.w_pairs[i / 16 + 1], 64);
      _tile_zero(0);
      _tile_zero(1);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
      _tile_stored(0, work.product[turn][0], 64);
      _tile_stored(1, work.product[turn][1], 64);
      turn ^= 1;
      if (column >= 0) add_product(span, state, first, column, work.product[turn]);
      first = c;
      column = i;
    }
  }
  add_product(span, state, first, column, work.product[turn ^ 1]);
}

}  // namespace MATE_ISA
}  // namespace mate
