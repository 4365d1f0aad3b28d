// Everything of a chunk that needs no state: a block a (chunk, value head).
//
// Decays are products of e = exp(a) along a binary tree over the chunk's tokens, so that no factor
// exceeds 1 (docs/algorithm.md). At level s the tokens form blocks of 2s: a key j in a left half
// meets the keys and queries i in the same block's right half, with the decay between them in two
// factors, `in` (from the middle to i) and `out` (from j to the middle). Every level has 32 rows
// and 32 columns, so that one routine of products serves them all.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

constexpr int kPrepareThreads = 256;
constexpr int kHalfChunk = kChunk / 2;
constexpr int kQuarters = kChunk / kBlock;  // a thread has 2 channels of a quarter's 16 tokens
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
  float L[kQuarters][kBlock][kBlock];  // within them
  float total[kQuarters][kDim];        // products of e
  float sum[kQuarters][kDim];          // sums of a
  float k_norm[kChunk], q_norm[kChunk], beta[kChunk];
  uint16_t scratch[kPrepareThreads / 32 * kScratch + 8];
};

// ---- loading ------------------------------------------------------------------------------------

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
  const int i = thread_index() / 4, block = i / kBlock * kBlock;
  MATE_UNROLL
  for (int j = thread_index() % 4; j < kBlock; j += 4) {
    if (block + j > i) *Tile<kChunk>{shared.P}.at(i, block + j) = 0;
  }
}

// One thread's decays: of two channels and 16 tokens, see above. out also carries k's norm.
struct Factors {
  int quarter, channel;
  float in[kBlock][2], out[kBlock][2];
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
  const int64_t first = work.token + f.quarter * kBlock;
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    f.in[i][0] = f.in[i][1] = 1.0f;
    if (f.quarter * kBlock + i >= work.tokens) continue;
    const char* row = row_at(p.args.g, work.batch, first + i, work.head);
    const Pair g = load_two(row, f.channel, p.args.g.dtype, p.g_aligned);
    const float a[2] = {log_decay(p, g.x, rate, bias[0]), log_decay(p, g.y, rate, bias[1])};
    MATE_UNROLL
    for (int c = 0; c < 2; ++c) {
      sum[c] += a[c];
      f.in[i][c] = fast_exp(a[c]);
    }
  }
  shared.sum[f.quarter][f.channel] = sum[0];
  shared.sum[f.quarter][f.channel + 1] = sum[1];
}

// ---- the tree -----------------------------------------------------------------------------------

template <int32_t kDtype>
MATE_DEVICE Pair raw(const uint16_t* matrix, int token, int channel) {
  return unpack<kDtype>(*reinterpret_cast<const uint32_t*>(matrix + token * kDim + channel));
}

// Rows and columns of level kHalf's products, in the order of their tokens.
template <int kHalf, int32_t kDtype>
MATE_DEVICE void form_operands(const Factors& f, PrepareShared& shared) {
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    const int token = f.quarter * kBlock + i;
    const int index = token / (2 * kHalf) * kHalf + token % kHalf;
    const Pair k = raw<kDtype>(shared.k, token, f.channel);
    if (token / kHalf % 2) {
      const Pair q = raw<kDtype>(shared.q, token, f.channel);
      store_pair(Tile<kDim>{shared.rows[0]}.at(index, f.channel),
                 pack_bf16(k.x * f.in[i][0], k.y * f.in[i][1]));
      store_pair(Tile<kDim>{shared.rows[1]}.at(index, f.channel),
                 pack_bf16(q.x * f.in[i][0], q.y * f.in[i][1]));
    } else {
      store_pair(Tile<kDim>{shared.columns}.at(index, f.channel),
                 pack_bf16(k.x * f.out[i][0], k.y * f.out[i][1]));
    }
  }
}

// L and P between the halves of level kHalf's blocks: a warp a tile.
template <int kHalf>
MATE_DEVICE void fill_LP(PrepareShared& shared) {
  const int warp = thread_index() / 32;
  const bool queries = warp % 2;
  const int row = warp / 2 % 2 * kBlock;
  const int column = kHalf == kHalfChunk ? warp / 4 * kBlock : row;
  if (kHalf != kHalfChunk && warp >= 4) return;  // tiles off the diagonal join no block
  FragC c = {};
  MATE_UNROLL
  for (int k = 0; k < kDim; k += kBlock) {
    multiply(c, load_a(Tile<kDim>{shared.rows[queries]}, row, k),
             load_b_columns(Tile<kDim>{shared.columns}, column, k));
  }
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    const int r = row + row_of(v), s = column + column_of(v);
    if (r / kHalf != s / kHalf) continue;
    const int i = r / kHalf * 2 * kHalf + kHalf + r % kHalf;
    const int j = s / kHalf * 2 * kHalf + s % kHalf;
    if (queries) {
      *Tile<kChunk>{shared.P}.at(i, j) = to_bf16(c.x[v] * shared.q_norm[i]);
      continue;
    }
    const float x = c.x[v] * shared.k_norm[i];
    if (kHalf < kBlock) {
      shared.L[i / kBlock][i % kBlock][j % kBlock] = x;
    } else {
      const uint16_t high = to_bf16(x);
      *Tile<kChunk>{shared.L_high}.at(i, j) = high;
      *Tile<kChunk>{shared.L_low}.at(i, j) = to_bf16(x - from_bits(uint32_t{high} << 16));
    }
  }
}

// Makes one block of two neighbours: right halves also decay through the left one, and what left
// halves write also decays through the right one.
template <int kHalf>
MATE_DEVICE void join_blocks(Factors& f, const PrepareShared& shared) {
  if (kHalf < kBlock) {
    MATE_UNROLL
    for (int left = 0; left < kBlock; left += 2 * kHalf) {
      MATE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float e_left = f.in[left + kHalf - 1][c], e_right = f.in[left + 2 * kHalf - 1][c];
        MATE_UNROLL
        for (int i = 0; i < kHalf; ++i) {
          f.in[left + kHalf + i][c] *= e_left;
          f.out[left + i][c] *= e_right;
        }
      }
    }
    return;
  }
  constexpr int kSpan = kHalf < kBlock ? 1 : kHalf / kBlock;  // quarters
  const int other = (f.quarter / kSpan ^ 1) * kSpan;
  const bool right = f.quarter / kSpan % 2;
  MATE_UNROLL
  for (int c = 0; c < 2; ++c) {
    float e = shared.total[other][f.channel + c];
    if (kSpan == 2) e *= shared.total[other + 1][f.channel + c];
    MATE_UNROLL
    for (int i = 0; i < kBlock; ++i) {
      if (right) {
        f.in[i][c] *= e;
      } else {
        f.out[i][c] *= e;
      }
    }
  }
}

template <int kHalf, int32_t kDtype>
MATE_DEVICE void climb(Factors& f, PrepareShared& shared) {
  form_operands<kHalf, kDtype>(f, shared);
  MATE_BARRIER();
  fill_LP<kHalf>(shared);
  MATE_BARRIER();
  join_blocks<kHalf>(f, shared);
  if (2 * kHalf == kBlock) {  // read after the next level's barriers
    shared.total[f.quarter][f.channel] = f.in[kBlock - 1][0];
    shared.total[f.quarter][f.channel + 1] = f.in[kBlock - 1][1];
  }
}

// ---- T = (I + diag(b) L)^-1 diag(b) ----------------------------------------------------------

MATE_DEVICE void store_split(PrepareShared& shared, int i, int j, float x) {
  const uint16_t high = to_bf16(x);
  *Tile<kChunk>{shared.T_high}.at(i, j) = high;
  *Tile<kChunk>{shared.T_low}.at(i, j) = to_bf16(x - from_bits(uint32_t{high} << 16));
}

// The tiles on the diagonal, by forward substitution: a thread a column.
MATE_DEVICE void solve_diagonal(PrepareShared& shared) {
  if (thread_index() >= kChunk) return;
  const int quarter = thread_index() / kBlock, column = thread_index() % kBlock;
  float x[kBlock];
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    float sum = i == column ? 1.0f : 0.0f;
    MATE_UNROLL
    for (int m = 0; m < i; ++m) sum -= shared.L[quarter][i][m] * x[m];
    x[i] = sum * shared.beta[quarter * kBlock + i];
    store_split(shared, quarter * kBlock + i, quarter * kBlock + column, x[i]);
  }
}

struct SplitA {
  FragA high, low;
};
struct SplitB {
  FragB high, low;
};

MATE_DEVICE void multiply(FragC& c, const SplitA& a, const SplitB& b) {
  multiply(c, a.low, b.high);
  multiply(c, a.high, b.low);
  multiply(c, a.high, b.high);
}

MATE_DEVICE SplitA to_split_operand(const FragC& c, uint16_t* scratch) {
  FragC rest;
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) rest.x[v] = c.x[v] - from_bits(uint32_t{to_bf16(c.x[v])} << 16);
  return {to_operand(c, scratch), to_operand(rest, scratch)};
}

// The corner of T between the kTiles * 16 tokens from `left` on and as many after them, by block
// doubling: -T_right L_corner T_left. A warp a tile {i, j}; no powers of L, which would cancel.
template <int kTiles>
MATE_DEVICE void fill_corner(PrepareShared& shared, int left, int i, int j) {
  const int right = left + kTiles * kBlock;
  const Tile<kChunk> T_high{shared.T_high}, T_low{shared.T_low};
  const Tile<kChunk> L_high{shared.L_high}, L_low{shared.L_low};
  FragC corner = {};
  for (int n = j; n < kTiles; ++n) {
    FragC c = {};
    for (int m = 0; m <= i; ++m) {
      const int row = right + i * kBlock, middle = right + m * kBlock, column = left + n * kBlock;
      multiply(c, SplitA{load_a(T_high, row, middle), load_a(T_low, row, middle)},
               SplitB{load_b_rows(L_high, middle, column), load_b_rows(L_low, middle, column)});
    }
    const int row = left + n * kBlock, column = left + j * kBlock;
    multiply(corner, to_split_operand(c, shared.scratch + thread_index() / 32 * kScratch),
             SplitB{load_b_rows(T_high, row, column), load_b_rows(T_low, row, column)});
  }
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    store_split(shared, right + i * kBlock + row_of(v), left + j * kBlock + column_of(v),
                -corner.x[v]);
  }
}

MATE_DEVICE void invert(PrepareShared& shared) {
  const int warp = thread_index() / 32;
  solve_diagonal(shared);
  MATE_BARRIER();
  if (warp < 2) fill_corner<1>(shared, warp * 2 * kBlock, 0, 0);
  MATE_BARRIER();
  if (warp < 4) fill_corner<2>(shared, 0, warp / 2, warp % 2);
  MATE_BARRIER();
}

// ---- results ------------------------------------------------------------------------------------

// What reads the state (k_in, q_in) may be rounded to bf16; what writes it may not, because the
// error goes where no later delta corrects it: k_out in two terms.
template <int32_t kDtype>
MATE_DEVICE void store_factors(const Factors& f, const PrepareShared& shared, Operands& out) {
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    const int token = f.quarter * kBlock + i, at = token * kDim + f.channel;
    const Pair k = raw<kDtype>(shared.k, token, f.channel);
    const Pair q = raw<kDtype>(shared.q, token, f.channel);
    const float k_norm = shared.k_norm[token], q_norm = shared.q_norm[token];
    store_pair(out.k_in + at, pack_bf16(k.x * f.in[i][0] * k_norm, k.y * f.in[i][1] * k_norm));
    store_pair(out.q_in + at, pack_bf16(q.x * f.in[i][0] * q_norm, q.y * f.in[i][1] * q_norm));
    const float x = k.x * f.out[i][0], y = k.y * f.out[i][1];
    const uint32_t high = pack_bf16(x, y);
    store_pair(out.k_out_high + at, high);
    store_pair(out.k_out_low + at,
               pack_bf16(x - from_bits(high << 16), y - from_bits(high & 0xffff0000u)));
  }
}

MATE_DEVICE void store_matrices(const PrepareShared& shared, Operands& out) {
  for (int i = thread_index(); i < kChunk * kChunk / 8; i += kPrepareThreads) {
    const int row = i / (kChunk / 8), piece = i % (kChunk / 8);
    if (piece >= lower_pieces(row)) continue;
    const auto copy = [&](const uint16_t* from, uint16_t* to) {
      const Tile<kChunk> tile{const_cast<uint16_t*>(from)};
      *reinterpret_cast<Eight*>(to + row * kChunk + piece * 8) =
          *reinterpret_cast<const Eight*>(tile.at(row, piece * 8));
    };
    copy(shared.T_high, out.T_high);
    copy(shared.T_low, out.T_low);
    copy(shared.P, out.P);
  }
}

template <int32_t kDtype>
MATE_KERNEL(kPrepareThreads)
prepare(const Params p) {
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(shared_memory());
  const int64_t chunk = p.slab_begin + block_index() / p.args.heads_v;
  const int64_t n = sequence_of(p, chunk);
  if (n >= p.args.num_seqs) return;
  const Sequence sequence = sequence_at(p, n);
  const int64_t token = sequence.begin + (chunk - sequence.first_chunk) * kChunk;
  const int64_t left = sequence.end - token;
  const Work work = {sequence.batch, token, block_index() % p.args.heads_v,
                     static_cast<int>(left < kChunk ? left : kChunk)};
  Factors f;
  f.quarter = thread_index() / 64;
  f.channel = thread_index() % 64 * 2;
  clear_P(shared);
  load_qk<kDtype>(p, work, shared);
  load_beta(p, work, shared);
  load_gates(p, work, f, shared);
  MATE_BARRIER();
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    f.out[i][0] = f.out[i][1] = shared.k_norm[f.quarter * kBlock + i];
  }
  climb<1, kDtype>(f, shared);
  climb<2, kDtype>(f, shared);
  climb<4, kDtype>(f, shared);
  climb<8, kDtype>(f, shared);
  climb<16, kDtype>(f, shared);
  climb<32, kDtype>(f, shared);

  Operands& out = p.operands[block_index()];
  store_factors<kDtype>(f, shared, out);
  if (thread_index() < kDim) {
    float sum = 0.0f;
    for (int i = 0; i < kQuarters; ++i) sum += shared.sum[i][thread_index()];
    out.decay[thread_index()] = fast_exp(sum);
  }
  invert(shared);
  store_matrices(shared, out);
}

}  // namespace gpu
}  // namespace mate
