// A chunk of one head's q, k, g and beta as `prepare` begins with them, and its shared memory.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

constexpr int kHalfChunk = kChunk / 2;
constexpr int kRun = 16;  // a thread has the decays of 2 channels and a run of so many tokens
constexpr int kRuns = kChunk / kRun;
constexpr int kPrepareThreads = kRuns * kDim / 2;
constexpr int kPrepareBlocks = 512 / kPrepareThreads;  // that a multiprocessor has room for
constexpr float kNormEps = 1e-6f;

struct PrepareShared {
  uint16_t k[kChunk * kDim], q[kChunk * kDim];  // as the caller gave them
  union {
    struct {
      uint16_t rows[2][kHalfChunk * kDim], columns[kHalfChunk * kDim];  // keys, queries; keys
    };
    struct {
      uint16_t T_high[kChunk * kChunk], T_low[kChunk * kChunk];
    };
  };
  uint16_t L_high[kChunk * kChunk], L_low[kChunk * kChunk];  // between blocks of 16 tokens
  uint16_t P[kChunk * kChunk];
  float L[kTokenTiles][kBlock][kBlock];  // within them
  float total[kRuns][kDim];              // products of e
  float sum[kRuns][kDim];                // sums of a
  float k_norm[kChunk], q_norm[kChunk], beta[kChunk];
  uint16_t scratch[kPrepareThreads / 32 * kScratch + 8];
};

struct Work {
  int64_t batch, token, head;
  int tokens;  // at most kChunk; absent ones are neutral
};

// Raw q and k, what they lack (l2 norm, and scale for q), and P's diagonal. Half a warp a row.
template <int32_t kDtype>
MATE_DEVICE void load_qk(const Params& p, const Work& work, PrepareShared& shared) {
  const int64_t head = work.head / (p.args.heads_v / p.args.heads_qk);
  const int column = thread_index() % 16 * 8;
  MATE_UNROLL
  for (int i = thread_index() / 16; i < kChunk; i += kPrepareThreads / 16) {
    Eight q = {}, k = {};
    if (i < work.tokens) {
      q = load_eight(row_at(p.args.q, work.batch, work.token + i, head), column, p.q_aligned);
      k = load_eight(row_at(p.args.k, work.batch, work.token + i, head), column, p.k_aligned);
    }
    *reinterpret_cast<Eight*>(shared.q + i * kDim + column) = q;
    *reinterpret_cast<Eight*>(shared.k + i * kDim + column) = k;
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
    MATE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Pair a = unpack<kDtype>(q.x[j]), b = unpack<kDtype>(k.x[j]);
      qq += a.x * a.x + a.y * a.y;
      kk += b.x * b.x + b.y * b.y;
      qk += a.x * b.x + a.y * b.y;
    }
    MATE_UNROLL
    for (int mask = 1; mask < 16; mask *= 2) {
      qq += shuffle_xor(qq, mask);
      kk += shuffle_xor(kk, mask);
      qk += shuffle_xor(qk, mask);
    }
    if (thread_index() % 16 == 0) {
      const bool normalise = p.args.flags & MATE_L2NORM;
      const float q_norm = p.args.scale * (normalise ? 1.0f / sqrtf(qq + kNormEps) : 1.0f);
      const float k_norm = normalise ? 1.0f / sqrtf(kk + kNormEps) : 1.0f;
      shared.q_norm[i] = q_norm;
      shared.k_norm[i] = k_norm;
      *Tile<kChunk>{shared.P}.at(i, i) = to_bf16(qk * q_norm * k_norm);
    }
  }
}

MATE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Relatively accurate far below zero too, where decays are near 1.
MATE_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

MATE_DEVICE void load_beta(const Params& p, const Work& work, PrepareShared& shared) {
  const int i = thread_index();
  if (i >= kChunk) return;
  float b = 0.0f;
  if (i < work.tokens) {
    const char* at = row_at(p.args.beta, work.batch, work.token + i, work.head);
    b = load_element(at, 0, p.args.beta.dtype);
    if (p.args.flags & MATE_BETA_SIGMOID) {
      b = sigmoid(b) * (p.args.flags & MATE_NEG_EIGVAL ? 2.0f : 1.0f);
    }
  }
  shared.beta[i] = b;
}

// P above its diagonal in the tiles on it.
MATE_DEVICE void clear_P(PrepareShared& shared) {
  for (int n = thread_index(); n < kChunk * kBlock; n += kPrepareThreads) {
    const int i = n / kBlock, j = i / kBlock * kBlock + n % kBlock;
    if (j > i) *Tile<kChunk>{shared.P}.at(i, j) = 0;
  }
}

// One thread's decays, see above. out also carries k's norm.
struct Factors {
  int first, channel;
  float in[kRun][2], out[kRun][2];
};

MATE_DEVICE float log_decay(const Params& p, float g, float rate, float bias) {
  if (p.args.gate == MATE_GATE_LOG_DECAY) return g;
  if (p.args.gate == MATE_GATE_BOUNDED) return p.args.lower_bound * sigmoid(rate * (g + bias));
  return -rate * softplus(g + bias);
}

MATE_DEVICE void load_gates(const Params& p, const Work& work, Factors& f, PrepareShared& shared) {
  float rate = 0.0f, bias[2] = {}, sum[2] = {};
  if (p.args.gate != MATE_GATE_LOG_DECAY) {
    rate = expf(p.args.A_log[work.head]);
    bias[0] = p.args.dt_bias[work.head * kDim + f.channel];
    bias[1] = p.args.dt_bias[work.head * kDim + f.channel + 1];
  }
  MATE_UNROLL
  for (int i = 0; i < kRun; ++i) {
    f.in[i][0] = f.in[i][1] = 1.0f;
    if (f.first + i >= work.tokens) continue;
    const char* row = row_at(p.args.g, work.batch, work.token + f.first + i, work.head);
    const Pair g = load_two(row, f.channel, p.args.g.dtype, p.g_aligned);
    const float a[2] = {log_decay(p, g.x, rate, bias[0]), log_decay(p, g.y, rate, bias[1])};
    MATE_UNROLL
    for (int c = 0; c < 2; ++c) {
      sum[c] += a[c];
      f.in[i][c] = fast_exp(a[c]);
    }
  }
  shared.sum[f.first / kRun][f.channel] = sum[0];
  shared.sum[f.first / kRun][f.channel + 1] = sum[1];
}

}  // namespace gpu
}  // namespace mate
