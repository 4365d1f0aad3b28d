// Reading the caller's tensors: addresses, l2 norm, gate, beta, and blocks of the state.
#pragma once

#include <math.h>

#include "simd.h"
#include "work.h"

namespace mate {
namespace MATE_ISA {

constexpr float kNormEps = 1e-6f;

MATE_INLINE int64_t element_size(int32_t dtype) { return dtype == MATE_FLOAT32 ? 4 : 2; }

// The row of 128 channels (or the one element of beta) at {batch, token, head}; for a state,
// {sequence, head, row}.
MATE_INLINE char* row(const mate_tensor& x, int64_t i, int64_t j, int64_t k) {
  const int64_t offset = i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  return static_cast<char*>(x.data) + offset * element_size(x.dtype);
}

// What turns one head's gate inputs into log-decays.
struct HeadGate {
  int32_t kind;
  float rate, lower_bound;  // rate = exp(A_log)
  const float* bias;        // [128]
};

MATE_INLINE HeadGate head_gate(const mate_kda_args& args, int64_t head) {
  if (args.gate == MATE_GATE_LOG_DECAY) return {args.gate, 0.0f, 0.0f, nullptr};
  return {args.gate, expf(args.A_log[head]), args.lower_bound, args.dt_bias + head * kDim};
}

MATE_INLINE Vec log_decay(const HeadGate& gate, Vec g, int channel) {
  if (gate.kind == MATE_GATE_LOG_DECAY) return g;
  const Vec x = g + load(gate.bias + channel);
  if (gate.kind == MATE_GATE_BOUNDED) return gate.lower_bound * sigmoid(gate.rate * x);
  return -gate.rate * softplus(x);
}

// b of `count` tokens; rounded up to whole vectors, `b` has room for them.
static void load_beta(const mate_kda_args& args, int64_t batch, int64_t token, int count,
                      int64_t head, float* b) {
  const int64_t size = element_size(args.beta.dtype);
  for (int i = 0; i < count; i += kWidth) {
    char raw[4 * kWidth] = {};
    for (int j = 0; j < kWidth && i + j < count; ++j) {
      __builtin_memcpy(raw + j * size, row(args.beta, batch, token + i + j, head), size);
    }
    Vec x = load_as(args.beta.dtype, raw, 0);
    if (args.flags & MATE_BETA_SIGMOID) x = sigmoid(x) * (args.flags & MATE_NEG_EIGVAL ? 2.f : 1.f);
    store(b + i, x);
  }
}

// Copies one token's q and k, as floats, and returns the factors that they still lack (the l2 norm
// and, for q, the scale) with their dot product.
struct TokenScales {
  float q, k, q_dot_k;
};

MATE_INLINE TokenScales load_qk(const mate_kda_args& args, int64_t batch, int64_t token,
                                int64_t head, float* q, float* k) {
  const int64_t head_qk = head / (args.heads_v / args.heads_qk);
  const char* q_row = row(args.q, batch, token, head_qk);
  const char* k_row = row(args.k, batch, token, head_qk);
  Vec qq = {}, kk = {}, qk = {};
  for (int c = 0; c < kDim; c += kWidth) {
    const Vec x = load_as(args.q.dtype, q_row, c), y = load_as(args.k.dtype, k_row, c);
    store(q + c, x);
    store(k + c, y);
    qq += x * x;
    kk += y * y;
    qk += x * y;
  }
  TokenScales s = {args.scale, 1.0f, sum(qk)};
  if (args.flags & MATE_L2NORM) {
    s.q /= __builtin_sqrtf(sum(qq) + kNormEps);
    s.k /= __builtin_sqrtf(sum(kk) + kNormEps);
  }
  s.q_dot_k = s.q_dot_k * s.q * s.k;  // the factors alone may underflow
  return s;
}

// ---- state --------------------------------------------------------------------------------------

// A matrix of channels in memory: rows of `stride` elements.
struct Block {
  void* data;
  int32_t dtype;
  int64_t stride;
};

MATE_INLINE void* at(const Block& x, int64_t row, int64_t column) {
  return static_cast<char*>(x.data) + (row * x.stride + column) * element_size(x.dtype);
}

MATE_INLINE void copy_block_as(Block from, Block to, int32_t from_dtype, int32_t to_dtype, int rows,
                               int columns, bool transposed) {
  from.dtype = from_dtype;  // constants where this is inlined
  to.dtype = to_dtype;
  for (int r = 0; r < rows; r += kWidth) {
    for (int c = 0; c < columns; c += kWidth) {
      Vec x[kWidth];
      MATE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        x[i] = load_as(from.dtype, transposed ? at(from, c + i, r) : at(from, r + i, c), 0);
      }
      if (transposed) transpose(x);
      MATE_UNROLL
      for (int i = 0; i < kWidth; ++i) store_as(to.dtype, at(to, r + i, c), 0, x[i]);
    }
  }
}

// to[r][c] = from[r][c], or from[c][r] if `transposed`; `rows` and `columns` (of `to`) are
// multiples of kWidth.
static void copy_block(const Block& from, const Block& to, int rows, int columns, bool transposed) {
  constexpr int32_t f32 = MATE_FLOAT32, f16 = MATE_FLOAT16, bf16 = MATE_BFLOAT16;
  if (from.dtype == f32 && to.dtype == f32) {
    copy_block_as(from, to, f32, f32, rows, columns, transposed);
  } else if (from.dtype == bf16) {
    copy_block_as(from, to, bf16, f32, rows, columns, transposed);
  } else if (to.dtype == bf16) {
    copy_block_as(from, to, f32, bf16, rows, columns, transposed);
  } else if (from.dtype == f16) {
    copy_block_as(from, to, f16, f32, rows, columns, transposed);
  } else {
    copy_block_as(from, to, f32, f16, rows, columns, transposed);
  }
}

// Whether the item's state lies in `state`: the initial or the final one.
MATE_INLINE bool has_state(const mate_tensor& state, const WorkItem& item) {
  return state.data && item.state >= 0;
}

// The caller's state of one sequence and head, from value channel `column` on: [V, K] or [K, V].
MATE_INLINE Block state_block(const mate_kda_args& args, const mate_tensor& state,
                              const WorkItem& item, int64_t head, int column) {
  Block x = {row(state, item.state, head, 0), state.dtype, state.stride[2]};
  x.data = args.flags & MATE_STATE_V_FIRST ? at(x, column, 0) : at(x, 0, column);
  return x;
}

}  // namespace MATE_ISA
}  // namespace mate
