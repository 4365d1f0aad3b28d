// AMX: 16-bit inputs, 32 tokens at a time. The products with the state run in tile registers on
// bf16 operands; the state between spans, the triangular solve and all accumulation are fp32.
#define MATE_ISA amx
#define MATE_SIMD_WIDTH 16
#include "tree.h"

namespace mate {
namespace amx {

constexpr int kPanel = 32;  // value channels handled together: two tile registers wide

// A head's state between spans, keys' channels in storage order: panels of 16 value channels, in
// fp32 and as the bf16 operand for the next span.
struct State {
  float (*exact)[kDim][16];
  Bf16 (*rounded)[kDim / 2][16][2];
};
constexpr int kStateFloats = kDim + kDim / 2;  // a value channel's

// What a span's products make, by value channel.
struct Work {
  alignas(64) float reads[kSpan][kDim];  // k_in S, then the output
  float w[kSpan][kDim];                  // v, then w
  Bf16 w_pairs[kDim / 16][kHalf][16][2];
  float product[2][4][16][16];  // k_out^T w, 32 x 32 of it in four tiles
};

// ---- products with the state --------------------------------------------------------------------

#define MATE_STORE_2X2(rows, column)                   \
  do {                                                 \
    _tile_stored(0, &rows[0][column], 4 * kDim);       \
    _tile_stored(1, &rows[0][column + 16], 4 * kDim);  \
    _tile_stored(2, &rows[16][column], 4 * kDim);      \
    _tile_stored(3, &rows[16][column + 16], 4 * kDim); \
  } while (0)

// Accumulators = 32 rows times one panel of the state.
MATE_INLINE void read_state(const Bf16 (*rows)[kDim], const Bf16 (*state)[kDim / 2][16][2]) {
  MATE_TILE_ZERO_4();
  MATE_UNROLL
  for (int c = 0; c < kDim; c += 32) {
    _tile_loadd(4, rows[0] + c, 2 * kDim);
    _tile_loadd(5, rows[16] + c, 2 * kDim);
    _tile_loadd(6, state[0][c / 2], 64);
    _tile_loadd(7, state[1][c / 2], 64);
    MATE_TILE_PRODUCTS_2X2();
  }
}

// w_i = v_scale v_i - read_scale (reads_i + sum_{j < i} L_ij w_j) for 8 rows: forward substitution
// on the right-hand side. L has its factor already.
MATE_INLINE void solve_rows(const Span& span, int half, int first, int column, Work& work) {
  constexpr int R = 8;
  Vec x[R][2];
  MATE_UNROLL
  for (int i = 0; i < R; ++i) {
    const float v = span.v_scale[first + i], r = span.read_scale[first + i];
    MATE_UNROLL
    for (int p = 0; p < 2; ++p) {
      const int c = column + p * kWidth;
      x[i][p] = load(work.w[first + i] + c) * v - load(work.reads[first + i] + c) * r;
    }
  }
  for (int j = half * kHalf; j < first; ++j) {
    const Vec w0 = load(work.w[j] + column), w1 = load(work.w[j] + column + kWidth);
    MATE_UNROLL
    for (int i = 0; i < R; ++i) {
      x[i][0] += span.L[first + i][j] * w0;
      x[i][1] += span.L[first + i][j] * w1;
    }
  }
  MATE_UNROLL
  for (int j = 0; j < R; ++j) {
    store(work.w[first + j] + column, x[j][0]);
    store(work.w[first + j] + column + kWidth, x[j][1]);
    MATE_UNROLL
    for (int i = j + 1; i < R; ++i) {
      x[i][0] += span.L[first + i][first + j] * x[j][0];
      x[i][1] += span.L[first + i][first + j] * x[j][1];
    }
  }
  MATE_UNROLL
  for (int j = 0; j < R; j += 2) {
    MATE_UNROLL
    for (int p = 0; p < 2; ++p) {
      Bf16(*pairs)[16][2] = work.w_pairs[column / 16 + p];
      const __m512i pair = pack_pairs(x[j][p], x[j + 1][p]);
      store_bits(pairs[(first + j) / 2][0], pair);
      if (half == 0) store_bits(pairs[(kHalf + first + j) / 2][0], pair);  // see carry_over
    }
  }
}

// reads += corner w: what the first half wrote reaches the second half's reads. The operand holds
// the first half twice, for the corner's high part and its low part.
MATE_INLINE void carry_over(const Span& span, int column, Work& work) {
  _tile_loadd(0, &work.reads[kHalf][column], 4 * kDim);
  _tile_loadd(1, &work.reads[kHalf][column + 16], 4 * kDim);
  _tile_loadd(4, span.corner, 64);
  _tile_loadd(6, work.w_pairs[column / 16], 64);
  _tile_loadd(7, work.w_pairs[column / 16 + 1], 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stored(0, &work.reads[kHalf][column], 4 * kDim);
  _tile_stored(1, &work.reads[kHalf][column + 16], 4 * kDim);
}

// A number that is not finite reaches every later token of its channel: the last one tells.
MATE_INLINE bool all_finite(const Work& work, int column) {
  const Vec x = load(work.w[kSpan - 1] + column) + load(work.w[kSpan - 1] + column + kWidth);
  return _mm512_cmp_ps_mask((__m512)(x - x), (__m512)Vec{}, _CMP_EQ_OQ) == 0xffff;
}

// P's zeros above the diagonal times a NaN would be NaN, which must not reach earlier tokens. So
// where w is not finite, zeros take its place in the product, and this adds what is missing.
static void add_not_finite(const Span& span, int column, Work& work) {
  for (int j = 0; j < kSpan; ++j) {
    for (int c = column; c < column + kPanel; ++c) {
      const float w = work.w[j][c];
      if (w - w == 0.0f) continue;
      for (int i = j; i < kSpan; ++i) work.reads[i][c] += span.P[i][j] * w;
    }
  }
}

static void copy_finite(const Bf16 (*from)[kHalf][16][2], Bf16 (*to)[kHalf][16][2]) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);  // all ones: an infinity or NaN
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < kHalf; ++i) {
      const __m512i x = _mm512_load_si512(from[half][i]);
      const __mmask32 finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      store_bits(to[half][i][0], _mm512_maskz_mov_epi16(finite, x));
    }
  }
}

// reads = q_in S + P w.
MATE_INLINE void make_output(const Span& span, const State& state, int panel, Work& work) {
  const int column = panel * kPanel;
  const bool finite = all_finite(work, column);
  const Bf16(*w)[kHalf][16][2] = work.w_pairs + 2 * panel;
  alignas(64) Bf16 finite_w[2][kHalf][16][2];
  if (!finite) {
    copy_finite(w, finite_w);
    w = finite_w;
    finish_stores();
  }
  read_state(span.read[1], state.rounded + 2 * panel);
  _tile_loadd(6, w[0], 64);
  _tile_loadd(7, w[1], 64);
  _tile_loadd(4, span.P_rows[0], 64);
  _tile_loadd(5, span.P_rows[kHalf], 64);
  MATE_TILE_PRODUCTS_2X2();
  MATE_STORE_2X2(work.reads, column);
  if (!finite) add_not_finite(span, column, work);
}

// ---- rows of the caller's tensors ---------------------------------------------------------------

MATE_INLINE void load_values(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                             int64_t head, int columns, Work& work) {
  for (int i = 0; i < n; ++i) {
    const char* v = row(args.v, item.batch, token + i, head);
    for (int c = 0; c < columns; c += kWidth) {
      store(work.w[i] + c, load_as(args.v.dtype, v, item.column_begin + c));
    }
  }
  for (int i = n; i < kSpan; ++i) __builtin_memset(work.w[i], 0, sizeof(float) * columns);
}

MATE_INLINE void store_output(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                              int64_t head, int column, const Span& span, const Work& work) {
  for (int i = 0; i < n; ++i) {
    char* o = row(args.output, item.batch, token + i, head);
    const float *x = work.reads[i] + column, scale = span.output_scale[i];
    const Vec a = load(x) * scale, b = load(x + kWidth) * scale;
    const int to = item.column_begin + column;
    if (args.output.dtype == MATE_BFLOAT16) {
      _mm512_storeu_si512(reinterpret_cast<Bf16*>(o) + to, pack(a, b));
    } else {
      store_as(args.output.dtype, o, to, a);
      store_as(args.output.dtype, o, to + kWidth, b);
    }
  }
}

// ---- the state ----------------------------------------------------------------------------------

// S <- Diag(decay) S + product for 32 channels of keys and one panel.
MATE_INLINE void add_product(const Span& span, const State& state, int panel, int c,
                             const float (*product)[16][16]) {
  MATE_UNROLL
  for (int tile = 0; tile < 4; ++tile) {
    const int first = c + tile / 2 * 16;
    float (*s)[16] = state.exact[2 * panel + tile % 2] + first;
    Bf16(*rounded)[16][2] = state.rounded[2 * panel + tile % 2] + first / 2;
    MATE_UNROLL
    for (int i = 0; i < 16; i += 2) {
      const Vec a = load(s[i]) * span.decay[first + i] + load(product[tile][i]);
      const Vec b = load(s[i + 1]) * span.decay[first + i + 1] + load(product[tile][i + 1]);
      store(s[i], a);
      store(s[i + 1], b);
      store_bits(rounded[i / 2][0], pack_pairs(a, b));
    }
  }
}

// k_out^T w for 32 channels of keys.
MATE_INLINE void make_product(const Span& span, int c, float (*product)[16][16]) {
  MATE_TILE_ZERO_4();
  MATE_UNROLL
  for (int part = 0; part < 2; ++part) {
    _tile_loadd(4, span.write[part][c], 64);
    _tile_loadd(5, span.write[part][c + 16], 64);
    MATE_TILE_PRODUCTS_2X2();
  }
  _tile_stored(0, product[0], 64);
  _tile_stored(1, product[1], 64);
  _tile_stored(2, product[2], 64);
  _tile_stored(3, product[3], 64);
}

// One panel; each product is made while the one before is added.
MATE_INLINE void update_state(const Span& span, const State& state, int panel, Work& work,
                              LaterRows& later) {
  _tile_loadd(6, work.w_pairs[2 * panel], 64);
  _tile_loadd(7, work.w_pairs[2 * panel + 1], 64);
  make_product(span, 0, work.product[0]);
  for (int c = 0; c < kDim; c += 32) {
    const int turn = c / 32 % 2;
    if (turn) later.fetch();
    if (c + 32 < kDim) make_product(span, c + 32, work.product[1 - turn]);
    add_product(span, state, panel, c, work.product[turn]);
  }
}

static void run_span(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                     int64_t head, const Span& span, const State& state, Work& work,
                     LaterRows& later) {
  const int columns = item.column_end - item.column_begin;
  load_values(args, item, token, n, head, columns, work);
  finish_stores();
  for (int panel = 0; panel < columns / kPanel; ++panel) {
    read_state(span.read[0], state.rounded + 2 * panel);
    MATE_STORE_2X2(work.reads, panel * kPanel);
    later.fetch();
  }
  for (int c = 0; c < columns; c += kPanel) {
    solve_rows(span, 0, 0, c, work);
    solve_rows(span, 0, 8, c, work);
  }
  finish_stores();
  for (int c = 0; c < columns; c += kPanel) carry_over(span, c, work);
  for (int c = 0; c < columns; c += kPanel) {
    solve_rows(span, 1, 16, c, work);
    solve_rows(span, 1, 24, c, work);
  }
  finish_stores();
  for (int panel = 0; panel < columns / kPanel; ++panel) {
    make_output(span, state, panel, work);
    later.fetch();
    if (panel) {
      store_output(args, item, token, n, head, (panel - 1) * kPanel, span, work);
    }
  }
  store_output(args, item, token, n, head, columns - kPanel, span, work);
  for (int panel = 0; panel < columns / kPanel; ++panel) {
    update_state(span, state, panel, work, later);
  }
}

// ---- state --------------------------------------------------------------------------------------

static State head_state(const WorkItem& item, int64_t head, float* states) {
  const int columns = item.column_end - item.column_begin;
  float* p = states + (head - item.head_begin) * columns * kStateFloats;
  return {reinterpret_cast<float (*)[kDim][16]>(p),
          reinterpret_cast<Bf16(*)[kDim / 2][16][2]>(p + columns * kDim)};
}

// The caller's state <-> ours, through 16 value channels of [K, V] in natural order.
static void load_state(const mate_kda_args& args, const WorkItem& item, int64_t head,
                       const State& to) {
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  for (int column = item.column_begin; column < item.column_end; column += 16) {
    alignas(64) float natural[kDim][16];
    if (has_state(args.initial_state, item)) {
      const Block from = state_block(args, args.initial_state, item, head, column);
      copy_block(from, {natural, MATE_FLOAT32, 16}, kDim, 16, v_first);
    } else {
      __builtin_memset(natural, 0, sizeof(natural));
    }
    const int panel = (column - item.column_begin) / 16;
    for (int c = 0; c < kDim; c += 2) {
      const Vec a = load(natural[channel_at(c)]), b = load(natural[channel_at(c + 1)]);
      store(to.exact[panel][c], a);
      store(to.exact[panel][c + 1], b);
      store_bits(to.rounded[panel][c / 2][0], pack_pairs(a, b));
    }
  }
}

static void store_state(const mate_kda_args& args, const WorkItem& item, int64_t head,
                        const State& from) {
  if (!has_state(args.final_state, item)) return;
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  for (int column = item.column_begin; column < item.column_end; column += 16) {
    alignas(64) float natural[kDim][16];
    const int panel = (column - item.column_begin) / 16;
    for (int c = 0; c < kDim; ++c) store(natural[channel_at(c)], load(from.exact[panel][c]));
    const Block to = state_block(args, args.final_state, item, head, column);
    copy_block({natural, MATE_FLOAT32, 16}, to, v_first ? 16 : kDim, v_first ? kDim : 16, v_first);
  }
}

// ---- an item ------------------------------------------------------------------------------------

// One head's gate with its bias in storage order.
struct StoredGate {
  alignas(64) float bias[kDim];
  HeadGate gate;
};

static void load_gate(const mate_kda_args& args, int64_t head, StoredGate& out) {
  out.gate = head_gate(args, head);
  if (!out.gate.bias) return;
  for (int c = 0; c < kDim; ++c) out.bias[c] = out.gate.bias[channel_at(c)];
  out.gate.bias = out.bias;
}

// Time outside, heads inside: see chunk.h.
static void run_chunked(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  const TileRegisters registers;
  static_assert(sizeof(Span) + sizeof(Work) <= kSpanFloats * sizeof(float), "the planner's");
  Span& span = *reinterpret_cast<Span*>(scratch);
  Work& work = *reinterpret_cast<Work*>(scratch + sizeof(Span) / sizeof(float));
  float* states = scratch + kSpanFloats;
  __builtin_memset(&span, 0, sizeof(span));
  StoredGate gates[kMaxHeads];
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    load_gate(args, h, gates[h - item.head_begin]);
    load_state(args, item, h, head_state(item, h, states));
  }
  for (int64_t t = item.begin; t < item.end; t += kSpan) {
    const int n = item.end - t < kSpan ? static_cast<int>(item.end - t) : kSpan;
    for (int64_t h = item.head_begin; h < item.head_end; ++h) {
      const bool last_head = h + 1 == item.head_end;
      LaterRows later = {args, item.batch, last_head ? item.head_begin : h + 1,
                         last_head && t + kSpan < item.end ? t + kSpan : t, item.end};
      load_span(args, item, gates[h - item.head_begin].gate, t, n, h, later, span);
      run_span(args, item, t, n, h, span, head_state(item, h, states), work, later);
    }
  }
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    store_state(args, item, h, head_state(item, h, states));
  }
}

// Inputs of fp32 keep fp32 arithmetic, and sequences that leave half a span empty are faster there.
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  const int32_t dtype = args.q.dtype;
  const bool sixteen_bits = dtype != MATE_FLOAT32 && args.k.dtype == dtype && args.v.dtype == dtype;
  if (sixteen_bits && !item.recurrent && item.end - item.begin > kHalf) {
    run_chunked(args, item, scratch);
  } else {
    avx512::run_item(args, item, scratch);
  }
}

}  // namespace amx
}  // namespace mate
