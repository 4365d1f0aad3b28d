// The AMX kernel's 32 tokens of one head, made ready for the products with the state.
//
// The mathematics is chunk.h's, with one more level in the tree of decays. The two lowest levels
// (pairs, fours) are fp32 arithmetic in registers; from there on L and P come from tile products
// of bf16 operands. Keys and queries stay as the caller gave them, not normalised: with n_i the
// factor that key i lacks, w_i = n_i u_i takes the place of u_i, and rows are scaled where they
// leave the products.
//
// Channels are kept in storage order: within 32 channels the even ones, then the odd ones, which is
// how two instructions unpack 32 bf16 numbers.
#pragma once

#include "amx.h"
#include "rows.h"

namespace mate {
namespace MATE_ISA {

constexpr int kHalf = 16;
constexpr int kSpan = 2 * kHalf;  // tokens

MATE_INLINE int channel_at(int position) {
  return position / 32 * 32 + position % 16 * 2 + position / 16 % 2;
}

struct Span {
  // fp32, see chunk.h; k_in, q_in and e are of one half at a time
  alignas(64) float k_in[kHalf][kDim];
  float q_in[kHalf][kDim], e[kHalf][kDim], k_out[kSpan][kDim];
  float total[kDim];                        // sums of log-decays
  float decay[kDim];                        // over the span
  float L[kSpan][kSpan], P[kSpan][kSpan];   // of raw keys and queries
  float q_norm[kSpan], k_norm[kSpan];       // squared
  float output_scale[kSpan];                // what queries lack: l2 norm and scale
  float v_scale[kSpan], read_scale[kSpan];  // w_i = v_scale v_i - read_scale ((k_in S)_i + ..)
  float beta[kSpan];
  // Operands of L and P between the halves of blocks. Of a half of the span: 8 keys, then 8
  // queries from the right halves of its blocks of 8 (of 16) tokens, and the left halves' keys,
  // first of the blocks of 8. Of the span: 16 keys, then 16 queries of its right half.
  Bf16 right[2][kHalf][kDim], left[kHalf][kDim];
  Bf16 last_right[2][kHalf][kDim], last_left[kHalf][kDim];
  Bf16 left_columns[kDim / 2][kHalf][2], last_left_columns[kDim / 2][kHalf][2];
  // Operands for the state.
  Bf16 read[2][kSpan][kDim];   // k_in, q_in
  Bf16 write[2][kDim][kSpan];  // k_out transposed: high part, low part
  Bf16 P_rows[kSpan][kSpan];
  Bf16 corner[kHalf][2 * kHalf];  // L's lower left corner: high part, low part
};

alignas(64) static const float kZeros[kDim] = {};

// Elements of 32 channels in storage order.
struct VecPair {
  Vec even, odd;
};

MATE_INLINE VecPair deal(Vec a, Vec b) {
  return {MATE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          MATE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

template <int32_t kDtype>
MATE_INLINE VecPair load_pair(const void* p, int channel) {
  if constexpr (kDtype == MATE_BFLOAT16) {
    const UintVec x = (UintVec)_mm512_loadu_si512(static_cast<const Bf16*>(p) + channel);
    return {(Vec)(x << 16), (Vec)(x & 0xffff0000u)};
  } else {
    return deal(load_as(kDtype, p, channel), load_as(kDtype, p, channel + kWidth));
  }
}

MATE_INLINE void store_pair(float* p, VecPair x) {
  store(p, x.even);
  store(p + kWidth, x.odd);
}

// The rows of tokens that come later. They lie on a page each, which the processor does not foresee
// by itself; and it can wait for a few lines only at a time, so that a token's are asked for now
// and then.
struct LaterRows {
  const mate_kda_args& args;
  int64_t batch, head, token, end;

  inline __attribute__((always_inline)) void fetch() {
    const int64_t head_qk = head / (args.heads_v / args.heads_qk);
    const char* rows[] = {row(args.q, batch, token, head_qk), row(args.k, batch, token, head_qk),
                          row(args.g, batch, token, head), row(args.v, batch, token, head)};
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) __builtin_prefetch(rows[i / 4] + i % 4 * 64, 0, 2);
    if (token + 1 < end) ++token;
  }
};

// ---- gates --------------------------------------------------------------------------------------

// e of one half and the sums of the log-decays; `bias` in storage order.
template <int32_t kGate, int32_t kDtype>
static void load_gates_as(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                          int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  HeadGate known = gate;
  known.kind = kGate;
  const char* first = row(args.g, item.batch, token, head);
  const int64_t stride = args.g.stride[1] * element_size(kDtype);
  for (int c = 0; c < kDim; c += 32) {
    Vec even = load(span.total + c), odd = load(span.total + c + kWidth);
    for (int i = 0; i < n; ++i) {
      const VecPair g = load_pair<kDtype>(first + i * stride, c);
      const Vec a = log_decay(known, g.even, c), b = log_decay(known, g.odd, c + kWidth);
      even += a;
      odd += b;
      store_pair(span.e[i] + c, {exp(a), exp(b)});
    }
    store_pair(span.total + c, {even, odd});
    later.fetch();
  }
  for (int i = n; i < kHalf; ++i) {  // absent tokens do not decay
    for (int c = 0; c < kDim; c += kWidth) store(span.e[i] + c, splat(1.0f));
  }
}

template <int32_t kGate>
static void load_gates_of(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                          int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  switch (args.g.dtype) {
    case MATE_FLOAT32:
      return load_gates_as<kGate, MATE_FLOAT32>(args, item, gate, token, n, head, later, span);
    case MATE_FLOAT16:
      return load_gates_as<kGate, MATE_FLOAT16>(args, item, gate, token, n, head, later, span);
    default:
      return load_gates_as<kGate, MATE_BFLOAT16>(args, item, gate, token, n, head, later, span);
  }
}

static void load_gates(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                       int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  switch (gate.kind) {
    case MATE_GATE_BOUNDED:
      return load_gates_of<MATE_GATE_BOUNDED>(args, item, gate, token, n, head, later, span);
    case MATE_GATE_SOFTPLUS:
      return load_gates_of<MATE_GATE_SOFTPLUS>(args, item, gate, token, n, head, later, span);
    default:
      return load_gates_of<MATE_GATE_LOG_DECAY>(args, item, gate, token, n, head, later, span);
  }
}

// ---- the tree -----------------------------------------------------------------------------------

// Lane i of the result is the sum of x[i]'s lanes, in memory.
MATE_INLINE void sum_into(float (&sums)[kWidth], Vec (&x)[kWidth]) { store(sums, sum_each(x)); }

// Norms and diagonal of P, and the two lowest levels, for 4 tokens.
template <int32_t kDtype>
MATE_INLINE void load_four(const void* const* q_rows, const void* const* k_rows, int half, int i0,
                           Span& span) {
  alignas(64) float sums[kWidth];
  const int t0 = half * kHalf + i0;
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
        e[i] = load(span.e[i0 + i] + p);
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
        store(span.k_in[i0 + i] + p, k_in[i]);
        store(span.q_in[i0 + i] + p, q_in[i]);
        store(span.k_out[t0 + i] + p, k_out[i]);
      }
      store(span.e[i0] + p, first * second);
    }
  }
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

template <int32_t kDtype>
static void load_fours(const mate_kda_args& args, const WorkItem& item, int64_t token, int n,
                       int64_t head, int half, LaterRows& later, Span& span) {
  const int64_t head_qk = head / (args.heads_v / args.heads_qk);
  for (int i0 = 0; i0 < kHalf; i0 += 4) {
    const void *q_rows[4], *k_rows[4];
    for (int i = 0; i < 4; ++i) {
      const bool present = i0 + i < n;
      q_rows[i] = present ? row(args.q, item.batch, token + i0 + i, head_qk) : nullptr;
      k_rows[i] = present ? row(args.k, item.batch, token + i0 + i, head_qk) : nullptr;
      if (!present) q_rows[i] = k_rows[i] = kZeros;
    }
    load_four<kDtype>(q_rows, k_rows, half, i0, span);
    later.fetch();
  }
}

}  // namespace MATE_ISA
}  // namespace mate
