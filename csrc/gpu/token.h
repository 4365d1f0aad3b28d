// One token of the recurrence: what it does to a state's rows, and its gate.
#pragma once

#include "state_rows.h"

namespace mate {
namespace gpu {

// In shared memory, for all rows of a head.
struct alignas(16) Token {
  float whole[kDim], part[kDim];  // of the decay
  float k[kDim], q[kDim], v[kDim];
};

// What q and k lack: the l2 norm and, for q, the scale.
struct TokenScales {
  float q, k, q_dot_k, beta;
};

// Sums over q^2, k^2 and q k of a lane's channels; the same on all lanes of a warp. Rounding is a
// few fp32 ulp throughout: inputs may be fp32, and memories thousands of tokens long.
MATE_DEVICE TokenScales find_scales(float qq, float kk, float qk, float beta, float scale,
                                    bool normalise) {
  MATE_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    qq += shuffle_xor(qq, mask);
    kk += shuffle_xor(kk, mask);
    qk += shuffle_xor(qk, mask);
  }
  TokenScales x = {scale, 1.0f, 0.0f, beta};
  if (normalise) {
    constexpr float kEps = 1e-6f;
    x.q *= fast_rsqrt(qq + kEps);
    x.k *= fast_rsqrt(kk + kEps);
  }
  x.q_dot_k = qk * x.q * x.k;  // the factors alone may underflow
  return x;
}

// ---- the gate -----------------------------------------------------------------------------------

// s * whole + s * part: near 1 a decay is 1 and what is lacking, in full precision.
struct Decay {
  float whole, part;
};

MATE_DEVICE float careful_sigmoid(float x) { return fast_reciprocal(1.0f + expf(-x)); }

// Of one head; log-decays are natural.
struct TokenGate {
  int32_t kind;
  float rate, lower_bound;

  MATE_DEVICE TokenGate(int32_t kind, const float* A_log, float lower_bound, int64_t head)
      : kind(kind),
        rate(kind == MATE_GATE_LOG_DECAY ? 0.0f : expf(A_log[head])),
        lower_bound(lower_bound) {}

  MATE_DEVICE Decay decay(float g, float bias) const {
    float a = g;
    if (kind == MATE_GATE_BOUNDED) {
      a = lower_bound * careful_sigmoid(rate * (g + bias));
    } else if (kind == MATE_GATE_SOFTPLUS) {
      const float x = g + bias;
      a = -rate * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
    }
    if (a > -0.5f) return {1.0f, expm1f(a)};
    return {0.0f, expf(a)};
  }
};

MATE_DEVICE float writing_strength(float beta, int32_t flags) {
  if (!(flags & MATE_BETA_SIGMOID)) return beta;
  return careful_sigmoid(beta) * (flags & MATE_NEG_EIGVAL ? 2.0f : 1.0f);
}

// ---- a step -------------------------------------------------------------------------------------

// Through one token; `output` of the thread's rows, the same on the eight lanes of a row. Both
// products are with the decayed state before the update, which adds (q k) delta to the output.
template <int32_t kDtype, int kRows, bool kValueFirst>
MATE_DEVICE void step(StateRows<kDtype, kRows, kValueFirst>& state, const Token& token,
                      const TokenScales& scales, int row, float (&output)[kRows]) {
  using Rows = StateRows<kDtype, kRows, kValueFirst>;
  float with_k[kRows] = {}, with_q[kRows] = {};
  MATE_UNROLL
  for (int j = 0; j < kRowChannels / 4; ++j) {
    const int channel = Rows::channel_of_four(j);
    const Four whole = load_four(token.whole + channel), part = load_four(token.part + channel);
    const Four k = load_four(token.k + channel), q = load_four(token.q + channel);
    MATE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& s = state.s[r][j * 4 + i];
        s = s * whole.x[i] + s * part.x[i];
        with_k[r] += s * k.x[i];
        with_q[r] += s * q.x[i];
      }
    }
  }
  MATE_UNROLL
  for (int mask = 1; mask < kRowLanes; mask *= 2) {
    MATE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      with_k[r] += shuffle_xor(with_k[r], mask);
      with_q[r] += shuffle_xor(with_q[r], mask);
    }
  }
  float written[kRows];
  MATE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float delta = (token.v[Rows::first_row(row) + r] - scales.k * with_k[r]) * scales.beta;
    output[r] = scales.q * with_q[r] + delta * scales.q_dot_k;
    written[r] = delta * scales.k;
  }
  MATE_UNROLL
  for (int j = 0; j < kRowChannels / 4; ++j) {
    const Four k = load_four(token.k + Rows::channel_of_four(j));
    MATE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) state.s[r][j * 4 + i] += k.x[i] * written[r];
    }
  }
}

// Lane r of a row's eight gets the r-th element: a register must not be chosen by an index.
template <int kRows>
MATE_DEVICE float pick(const float (&x)[kRows]) {
  float mine = x[0];
  MATE_UNROLL
  for (int r = 1; r < kRows; ++r) mine = row_lane() == r ? x[r] : mine;
  return mine;
}

}  // namespace gpu
}  // namespace mate
