// What `prepare` begins with: a warp takes 16 of its chunk's tokens, fetches their q, k and g, and
// leaves l2 norms and sums of log-decays in shared memory.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

constexpr int kPrepareThreads = kTokenTiles * 32;  // a warp a tile of tokens
constexpr int kPrepareBlocks = 4;                  // that a multiprocessor shall have room for
constexpr int kLane = kDim / 32;                   // channels a lane: kLane * lane and the next
constexpr int kStep = 4;                           // tokens at a time: FourRows
constexpr float kNormEps = 1e-6f;
constexpr float kLog2e = 1.44269504f;
// Log-decays are in bits. Below this one a token erases whatever fp32 can hold.
constexpr float kErased = -160.0f;
// They are kept as fp16 in such a unit, the bounded gate's in parts of its bound: rounded by 2^-11
// of themselves, and down to 2^-22 bits a token at least, where a memory lasts millions of these.
constexpr float kUnit = 1.0f / 256, kPartBits = 15, kParts = 32768;
// The bounded gate's kind where its bound is below kErased: that is its bound then.
constexpr int kDeepGate = 3;
static_assert(kDeepGate != MATE_GATE_BOUNDED && kDeepGate != MATE_GATE_SOFTPLUS &&
                  kDeepGate != MATE_GATE_LOG_DECAY,
              "a kind of its own");
MATE_DEVICE int gate_of(const Params& p) {
  const bool deep = p.args.lower_bound * kLog2e < kErased;
  return p.args.gate == MATE_GATE_BOUNDED && deep ? kDeepGate : p.args.gate;
}
MATE_DEVICE float kept_unit(const Params& p) {
  if (gate_of(p) != MATE_GATE_BOUNDED) return kUnit;
  return p.args.lower_bound * (kLog2e / kParts);
}

// One warp's tokens.
struct TileShared {
  uint16_t q[kBlock * kDim], k[kBlock * kDim];  // as the caller gave them; then rows of products
  uint16_t g[kBlock * kDim];  // 16-bit g; then log-decays; then columns of products, see prepare.h
};

struct PrepareShared {
  union {
    TileShared tile[kTokenTiles];
    struct {  // once all products are done; Tile<kChunk>
      uint16_t T_high[kChunk * kChunk], T_low[kChunk * kChunk], P[kChunk * kChunk];
      uint16_t L_high[kChunk * kChunk], L_low[kChunk * kChunk];  // below the diagonal tiles
      float L[kTokenTiles][kBlock][kBlock], T[kTokenTiles][kBlock][kBlock];  // of those
    };
  };
  float total[kTokenTiles][kDim];                   // sums over whole tiles
  uint16_t own[kTokenTiles][kDim], other[4][kDim];  // what columns are multiplied by
  float k_norm[kChunk], q_norm[kChunk], beta[kChunk];
  uint16_t scratch[kTokenTiles * kScratch + 8];
  bool forgets[kTokenTiles];  // more than fp32 can hold
};

// A warp's tokens in the caller's tensors.
struct Tokens {
  int64_t token;         // the first one
  uint32_t batch, head;  // value head
  int first, count;      // in the chunk; as many are present, at most kBlock
};

MATE_DEVICE int lane_channel() { return lane_index() * kLane; }

// ---- fetching -----------------------------------------------------------------------------------

// What is alike in fetching rows of any tensor: two at a time, 16 bytes a lane.
struct RowPlaces {
  int odd, column;    // the lane's
  unsigned bytes[4];  // where rows 0, 2, 4, 6, or those after them, go to in a tile

  MATE_DEVICE RowPlaces() : odd(lane_index() / 16), column(lane_index() % 16 * 8) {
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) bytes[i] = Tile<kDim>::place(2 * i | odd, column) * 2;
  }
};

// Rows of 16-bit numbers; those of absent tokens are zeros.
MATE_DEVICE void fetch_rows(const mate_tensor& x, bool aligned, const Tokens& t, uint32_t head,
                            const RowPlaces& places, uint16_t* tile) {
  const int64_t offset = offset_of(x, t.batch, t.token + places.odd, head) + places.column;
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
  const int64_t step = 2 * x.stride[1];
  const int left = t.count - places.odd;
  const auto to = [&](int row) {
    return reinterpret_cast<char*>(tile) + places.bytes[row / 2 % 4] + row / 8 * 8 * kDim * 2;
  };
  if (aligned) {
    MATE_UNROLL
    for (int row = 0; row < kBlock; row += 2, from += step) copy_async(to(row), from, row < left);
    return;
  }
  MATE_NO_UNROLL
  for (int row = 0; row < kBlock; row += 2, from += step) {
    *reinterpret_cast<Eight*>(Tile<kDim>{tile}.at(row | places.odd, places.column)) =
        row < left ? load_eight(from, 0, false) : Eight{};
  }
}

// Rows of fp32 g, which shared memory has no room for: a lane's channels of kStep rows at a time.
struct WideGates {
  const char* from;
  int64_t stride;
  int left;
  bool aligned;
  Four rows[kStep];

  MATE_DEVICE WideGates(const Params& p, const Tokens& t)
      : stride(p.args.g.stride[1] * 4), left(t.count), aligned(p.g_aligned) {
    if (p.args.g.dtype != MATE_FLOAT32) return;
    from = row_at(p.args.g, t.batch, t.token, t.head) + lane_channel() * 4;
    fetch();
  }

  // The next ones; those of absent tokens are zeros.
  MATE_DEVICE void fetch() {
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r, from += stride) {
      rows[r] = Four{};
      if (r >= left) continue;
      const float* at = reinterpret_cast<const float*>(from);
      if (aligned) {
        rows[r] = load_four(at);
      } else {
        MATE_UNROLL
        for (int c = 0; c < kLane; ++c) rows[r].x[c] = at[c];
      }
    }
    left -= kStep;
  }
};

MATE_DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-kLog2e * x)); }

// What a lane needs of the small tensors, asked for before anything is waited for.
struct Scalars {
  uint32_t beta;  // of token lane_index(), as it came
  float A_log, dt_bias[kLane];
};

MATE_DEVICE Scalars fetch_scalars(const Params& p, const Tokens& t) {
  Scalars x = {};
  if (lane_index() < t.count) {
    const char* at = row_at(p.args.beta, t.batch, t.token + lane_index(), t.head);
    x.beta = load_bits(at, 0, p.args.beta.dtype);
  }
  if (p.args.gate != MATE_GATE_LOG_DECAY) {
    x.A_log = p.args.A_log[t.head];
    MATE_UNROLL
    for (int c = 0; c < kLane; ++c) {
      x.dt_bias[c] = p.args.dt_bias[t.head * kDim + lane_channel() + c];
    }
  }
  return x;
}

MATE_DEVICE void store_beta(const Params& p, const Tokens& t, uint32_t bits,
                            PrepareShared& shared) {
  if (lane_index() >= kBlock) return;
  float b = to_float(bits, p.args.beta.dtype);
  if (p.args.flags & MATE_BETA_SIGMOID) {
    b = sigmoid(b) * (p.args.flags & MATE_NEG_EIGVAL ? 2.0f : 1.0f);
  }
  shared.beta[t.first + lane_index()] = lane_index() < t.count ? b : 0.0f;
}

// ---- norms --------------------------------------------------------------------------------------

// Sums of squares of the tile's rows of q and k, to where the norms will be. bf16 by products of
// the tile with itself, which are exact; fp16 row by row, two lanes a row.
MATE_DEVICE void sum_squares_bf16(const Tokens& t, const TileShared& tile, PrepareShared& shared) {
  const Tile<kDim> q{tile.q}, k{tile.k};
  FragC qq = {}, kk = {};
  MATE_UNROLL
  for (int i = 0; i < kDim; i += kBlock) {
    const FragA q_rows = load_a(q, 0, i), k_rows = load_a(k, 0, i);
    multiply(qq, q_rows, as_columns(q_rows));
    multiply(kk, k_rows, as_columns(k_rows));
  }
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    if (row_of(v) != column_of(v)) continue;
    shared.q_norm[t.first + row_of(v)] = qq.x[v];
    shared.k_norm[t.first + row_of(v)] = kk.x[v];
  }
}

MATE_DEVICE void sum_squares_fp16(const Tokens& t, const TileShared& tile, PrepareShared& shared) {
  const int row = lane_index() / 2, half = lane_index() % 2;
  float qq = 0.0f, kk = 0.0f;
  MATE_NO_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int column = half * 64 + (i ^ half * 4) * 8;  // the halves meet different banks
    const Eight q = *reinterpret_cast<const Eight*>(Tile<kDim>{tile.q}.at(row, column));
    const Eight k = *reinterpret_cast<const Eight*>(Tile<kDim>{tile.k}.at(row, column));
    MATE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Pair a = unpack<MATE_FLOAT16>(q.x[j]), b = unpack<MATE_FLOAT16>(k.x[j]);
      qq += a.x * a.x;
      qq += a.y * a.y;
      kk += b.x * b.x;
      kk += b.y * b.y;
    }
  }
  qq += shuffle_xor(qq, 1);
  kk += shuffle_xor(kk, 1);
  if (half == 0) {
    shared.q_norm[t.first + row] = qq;
    shared.k_norm[t.first + row] = kk;
  }
}

// What the rows of q and k are to be multiplied by.
template <int32_t kDtype>
MATE_DEVICE void find_norms(const Params& p, const Tokens& t, PrepareShared& shared) {
  const bool normalise = p.args.flags & MATE_L2NORM;
  const TileShared& tile = shared.tile[t.first / kBlock];
  if (normalise) {
    if (kDtype == MATE_BFLOAT16) {
      sum_squares_bf16(t, tile, shared);
    } else {
      sum_squares_fp16(t, tile, shared);
    }
    MATE_WARP_BARRIER();
  }
  if (lane_index() >= kBlock) return;
  float &q = shared.q_norm[t.first + lane_index()], &k = shared.k_norm[t.first + lane_index()];
  q = normalise ? p.args.scale * fast_rsqrt(q + kNormEps) : p.args.scale;
  k = normalise ? fast_rsqrt(k + kNormEps) : 1.0f;
}

// ---- log-decays ---------------------------------------------------------------------------------

// Relatively accurate far below zero too, where decays are near 1.
MATE_DEVICE float softplus(float x) {
  const float u = fast_exp2(-kLog2e * fabsf(x));
  const float series = u * (1.0f - u * (0.5f - u * (0.33333333f - u * 0.25f)));
  return fmaxf(x, 0.0f) + (u < 0.04f ? series : fast_log2(1.0f + u) * 0.69314718f);
}

// One lane's channels of a head's gate, with all factors that do not depend on g in one.
template <int kGate>
struct Gate {
  float factor, rate, bias[kLane];

  MATE_DEVICE Gate(const Params& p, const Scalars& x) {
    rate = fast_exp2(kLog2e * x.A_log) * -kLog2e;
    MATE_UNROLL
    for (int c = 0; c < kLane; ++c) {
      bias[c] = kGate == MATE_GATE_SOFTPLUS ? x.dt_bias[c] : x.dt_bias[c] * rate;
      if (kGate == MATE_GATE_BOUNDED) bias[c] -= kPartBits;
    }
    factor = kGate == MATE_GATE_SOFTPLUS ? rate / kUnit : kLog2e / kUnit;
    if (kGate == kDeepGate) factor *= p.args.lower_bound;
  }

  // A log-decay in its unit.
  MATE_DEVICE float kept(float g, int c) const {
    if (kGate == MATE_GATE_BOUNDED) {
      return fast_reciprocal(1.0f / kParts + fast_exp2(g * rate + bias[c]));
    }
    float x = g;
    if (kGate == MATE_GATE_SOFTPLUS) x = softplus(g + bias[c]);
    if (kGate == kDeepGate) x = fast_reciprocal(1.0f + fast_exp2(g * rate + bias[c]));
    x *= factor;
    return x < kErased / kUnit ? kErased / kUnit : x;  // and NaN stays NaN
  }
};

template <int32_t kDtype, int kGate>
MATE_DEVICE Four sum_gates(const Params& p, const Tokens& t, const Scalars& x, WideGates& wide,
                           TileShared& tile) {
  const Gate<kGate> gate(p, x);
  Four exact = {}, sum = {};  // before and after rounding
  PackedFour last = {};
  FourRows<kDim> rows(lane_channel());
  MATE_NO_UNROLL
  for (int i = 0; i < kBlock; i += kStep, rows.advance()) {
    Four g[kStep];
    if (p.args.g.dtype == MATE_FLOAT32) {
      MATE_UNROLL
      for (int r = 0; r < kStep; ++r) g[r] = wide.rows[r];
      wide.fetch();
    } else {
      MATE_UNROLL
      for (int r = 0; r < kStep; ++r) g[r] = unpack_four<kDtype>(rows.at(tile.g, r));
    }
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      MATE_UNROLL
      for (int c = 0; c < kLane; ++c) g[r].x[c] = gate.kept(g[r].x[c], c);
    }
    if (t.count < kBlock) {
      MATE_UNROLL
      for (int r = 0; r < kStep; ++r) {
        if (i + r >= t.count) g[r] = Four{};  // absent tokens decay nothing
      }
    }
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      last = pack_four<MATE_FLOAT16>(g[r]);
      store_four(rows.at(tile.g, r), last);
      exact = exact + g[r];
      sum = sum + unpack_four<MATE_FLOAT16>(last);
    }
  }
  // The last token makes up for what rounding took from all: else it would add up. That is 2^-7 of
  // the last one at most, where all are alike; where a weak one follows strong ones it gets less.
  const float unit = kept_unit(p), least = 0x1p-10f * fast_reciprocal(fabsf(unit));
  const Four before = unpack_four<MATE_FLOAT16>(last), lack = exact - sum;
  Four after;
  MATE_UNROLL
  for (int c = 0; c < kLane; ++c) {
    const float most = fmaxf(least, 0x1p-7f * fabsf(before.x[c]));
    after.x[c] = before.x[c] + fmaxf(fminf(lack.x[c], most), -most);
  }
  last = pack_four<MATE_FLOAT16>(after);
  store_four(Tile<kDim>{tile.g}.at(kBlock - 1, lane_channel()), last);
  return (sum + (unpack_four<MATE_FLOAT16>(last) - before)) * unit;
}

// The tile's log-decays to shared memory; their sums over the whole tile come back.
template <int32_t kDtype>
MATE_DEVICE Four sum_gates(const Params& p, const Tokens& t, const Scalars& x, WideGates& wide,
                           TileShared& tile) {
  const int gate = gate_of(p);
  if (gate == MATE_GATE_BOUNDED) {
    return sum_gates<kDtype, MATE_GATE_BOUNDED>(p, t, x, wide, tile);
  }
  if (gate == MATE_GATE_SOFTPLUS) {
    return sum_gates<kDtype, MATE_GATE_SOFTPLUS>(p, t, x, wide, tile);
  }
  if (gate == kDeepGate) return sum_gates<kDtype, kDeepGate>(p, t, x, wide, tile);
  return sum_gates<kDtype, MATE_GATE_LOG_DECAY>(p, t, x, wide, tile);
}

}  // namespace gpu
}  // namespace mate
