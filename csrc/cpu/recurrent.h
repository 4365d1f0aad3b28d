// The recurrence token by token, for short sequences: decode, speculative verification.
//
// kWidth value rows [V, K] at a time stay in the first cache for a burst of tokens. Each token
// costs one pass over them: the previous token's update, its own decay, and the products with k and
// q. The output then needs no second pass: q (S + k delta) = q S + (q k) delta.
//
// States [K, V] are transposed on the way in and out, except for a single token in fp32 (the decode
// step of transformers' caches), where two passes over the state as it lies are cheaper.
#pragma once

#include "rows.h"

namespace mate {
namespace MATE_ISA {

struct Token {                    // kTokenFloats
  float whole[kDim], part[kDim];  // the decay, see simd.h
  float k[kDim], q[kDim];
  float q_dot_k, beta;
  float unused[14];  // keeps the arrays aligned to 64 bytes
};

static void load_tokens(const mate_kda_args& args, const WorkItem& item, const HeadGate& gate,
                        int64_t token, int n, int64_t head, Token* tokens) {
  for (int i = 0; i < n; ++i) {
    Token& x = tokens[i];
    const TokenScales scales = load_qk(args, item.batch, token + i, head, x.q, x.k);
    x.q_dot_k = scales.q_dot_k;
    const char* g = row(args.g, item.batch, token + i, head);
    for (int c = 0; c < kDim; c += kWidth) {
      const Decay d = decay(log_decay(gate, load_as(args.g.dtype, g, c), c));
      store(x.whole + c, d.whole);
      store(x.part + c, d.part);
      store(x.k + c, load(x.k + c) * scales.k);
      store(x.q + c, load(x.q + c) * scales.q);
    }
  }
  for (int i = 0; i < n; i += kTile) {
    float beta[kTile];
    const int count = n - i < kTile ? n - i : kTile;
    load_beta(args, item.batch, token + i, count, head, beta);
    for (int j = 0; j < count; ++j) tokens[i + j].beta = beta[j];
  }
}

static_assert(sizeof(Token) == kTokenFloats * sizeof(float), "the planner reserves this much");

// Rows of the state in fp32: read from `from`, kept in `rows` from the first token on.
struct StateRows {
  const float* from;
  int64_t from_stride;
  float* rows;
  int64_t stride;
};

// Four rows and one token; adds to `with_k` and `with_q` one vector a row, whose lanes' sums are
// the products of the decayed rows with k and q.
MATE_INLINE void pass_token(const float* from, int64_t from_stride, float* to, int64_t stride,
                            const float* k_before, const float* delta, const Token& token,
                            Vec* with_k, Vec* with_q) {
  Vec x[4] = {}, y[4] = {};
  for (int c = 0; c < kDim; c += kWidth) {
    const Vec before = load(k_before + c), k = load(token.k + c), q = load(token.q + c);
    const Vec whole = load(token.whole + c), part = load(token.part + c);
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      Vec s = load(from + i * from_stride + c) + before * delta[i];
      s = s * whole + s * part;
      store(to + i * stride + c, s);
      x[i] += s * k;
      y[i] += s * q;
    }
  }
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    with_k[i] = x[i];
    with_q[i] = y[i];
  }
}

// kWidth value rows behind `token`, whose update they still lack, to where the caller keeps the
// states after each token.
static void store_token_state(const mate_kda_args& args, const WorkItem& item, int64_t token,
                              int64_t head, int column, const StateRows& s, const float* k,
                              const float* delta) {
  alignas(64) float after[kWidth][kDim];
  for (int i = 0; i < kWidth; ++i) {
    for (int c = 0; c < kDim; c += kWidth) {
      store(after[i] + c, load(s.rows + i * s.stride + c) + load(k + c) * delta[i]);
    }
  }
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  Block to = {row(args.token_states, item.batch, token, head), args.token_states.dtype, kDim};
  to.data = v_first ? at(to, column, 0) : at(to, 0, column);
  copy_block({after, MATE_FLOAT32, kDim}, to, v_first ? kWidth : kDim, v_first ? kDim : kWidth,
             !v_first);
}

// kWidth value rows, from channel `column` on, through n tokens.
static void run_rows(const mate_kda_args& args, const WorkItem& item, const Token* tokens,
                     int64_t first, int n, int64_t head, int column, StateRows s) {
  alignas(64) float delta[kWidth] = {};
  const float* k_before = tokens[0].k;
  for (int t = 0; t < n; ++t) {
    const Token& token = tokens[t];
    const float* from = t == 0 ? s.from : s.rows;
    const int64_t from_stride = t == 0 ? s.from_stride : s.stride;
    Vec with_k[kWidth], with_q[kWidth];
    for (int i = 0; i < kWidth; i += 4) {
      pass_token(from + i * from_stride, from_stride, s.rows + i * s.stride, s.stride, k_before,
                 delta + i, token, with_k + i, with_q + i);
    }
    const Vec v = load_as(args.v.dtype, row(args.v, item.batch, first + t, head), column);
    const Vec d = (v - sum_each(with_k)) * token.beta;
    store(delta, d);
    store_as(args.output.dtype, row(args.output, item.batch, first + t, head), column,
             sum_each(with_q) + d * token.q_dot_k);
    k_before = token.k;
    if (args.token_states.data) {
      store_token_state(args, item, first + t, head, column, s, k_before, delta);
    }
  }
  for (int i = 0; i < kWidth; ++i) {
    for (int c = 0; c < kDim; c += kWidth) {
      float* p = s.rows + i * s.stride + c;
      store(p, load(p) + load(k_before + c) * delta[i]);
    }
  }
}

// One token on kVectors vectors of value channels of a state [K, V] in fp32: a pass for the
// products of the decayed state with k and q, and one that decays and updates it, while it is in
// the first cache.
template <int kVectors>
MATE_INLINE void step_columns(const mate_kda_args& args, const WorkItem& item, const Token& token,
                              const float* read_k, const float* read_q, int64_t head, int column) {
  const Block from = state_block(args, args.initial_state, item, head, column);
  const Block to = state_block(args, args.final_state, item, head, column);
  Vec with_k[kVectors] = {}, with_q[kVectors] = {};
  for (int c = 0; c < kDim; ++c) {
    const float* s = static_cast<const float*>(at(from, c, 0));
    MATE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const Vec x = load(s + i * kWidth);
      with_k[i] += x * read_k[c];
      with_q[i] += x * read_q[c];
    }
  }
  const char* v = row(args.v, item.batch, item.begin, head);
  char* output = row(args.output, item.batch, item.begin, head);
  Vec delta[kVectors];
  MATE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int at_column = column + i * kWidth;
    delta[i] = (load_as(args.v.dtype, v, at_column) - with_k[i]) * token.beta;
    store_as(args.output.dtype, output, at_column, with_q[i] + delta[i] * token.q_dot_k);
  }
  for (int c = 0; c < kDim; ++c) {
    const float* s = static_cast<const float*>(at(from, c, 0));
    float* t = static_cast<float*>(at(to, c, 0));
    MATE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const Vec x = load(s + i * kWidth);
      store(t + i * kWidth, x * token.whole[c] + (x * token.part[c] + delta[i] * token.k[c]));
    }
  }
}

static void step_key_first(const mate_kda_args& args, const WorkItem& item, Token* token) {
  constexpr int kSome = 32 / kWidth, kMany = kWidth == 16 ? 4 : kSome;
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    load_tokens(args, item, head_gate(args, head), item.begin, 1, head, token);
    alignas(64) float read_k[kDim], read_q[kDim];  // the decay moved from the state to k and q
    for (int c = 0; c < kDim; c += kWidth) {
      const Vec factor = load(token->whole + c) + load(token->part + c);
      store(read_k + c, load(token->k + c) * factor);
      store(read_q + c, load(token->q + c) * factor);
    }
    int column = item.column_begin;
    for (; column + kMany * kWidth <= item.column_end; column += kMany * kWidth) {
      step_columns<kMany>(args, item, *token, read_k, read_q, head, column);
    }
    for (; column < item.column_end; column += kSome * kWidth) {
      step_columns<kSome>(args, item, *token, read_k, read_q, head, column);
    }
  }
}

// At least one token. Scratch: the tokens of a burst, then rows of the state.
static void run_recurrent(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  Token* tokens = reinterpret_cast<Token*>(scratch);
  const mate_tensor &initial = args.initial_state, &final = args.final_state;
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  const int64_t length = item.end - item.begin;
  const bool reads = has_state(initial, item), writes = has_state(final, item);
  const bool in_fp32 = initial.dtype == MATE_FLOAT32 && final.dtype == MATE_FLOAT32;
  if (length == 1 && !v_first && reads && writes && in_fp32 && !args.token_states.data) {
    return step_key_first(args, item, tokens);
  }
  const int64_t burst = length < kBurst ? length : kBurst;
  float* buffer = reinterpret_cast<float*>(tokens + burst);
  // One burst: its tokens are prepared once and rows stream through. More: all rows stay in
  // scratch.
  const int columns = item.column_end - item.column_begin;
  const int group = length <= kBurst ? kWidth : columns;

  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    const HeadGate gate = head_gate(args, head);
    if (length <= kBurst) {
      load_tokens(args, item, gate, item.begin, static_cast<int>(length), head, tokens);
    }
    for (int column = item.column_begin; column < item.column_end; column += group) {
      const Block work = {buffer, MATE_FLOAT32, kDim};
      Block from = work, to = work;
      if (!reads) {
        __builtin_memset(buffer, 0, sizeof(float) * kDim * group);
      } else {
        from = state_block(args, initial, item, head, column);
        if (!v_first || from.dtype != MATE_FLOAT32) {
          copy_block(from, work, group, kDim, !v_first);
          from = work;
        }
      }
      const bool direct = writes && v_first && final.dtype == MATE_FLOAT32;
      if (direct) to = state_block(args, final, item, head, column);

      for (int64_t t = 0; t < length; t += kBurst) {
        const int n = length - t < kBurst ? static_cast<int>(length - t) : kBurst;
        if (length > kBurst) load_tokens(args, item, gate, item.begin + t, n, head, tokens);
        for (int r = 0; r < group; r += kWidth) {
          const StateRows rows = {static_cast<float*>(at(from, r, 0)), from.stride,
                                  static_cast<float*>(at(to, r, 0)), to.stride};
          run_rows(args, item, tokens, item.begin + t, n, head, column + r, rows);
        }
        from = to;
      }
      if (writes && !direct) {
        const Block out = state_block(args, final, item, head, column);
        copy_block(work, out, v_first ? group : kDim, v_first ? kDim : group, !v_first);
      }
    }
  }
}

}  // namespace MATE_ISA
}  // namespace mate
