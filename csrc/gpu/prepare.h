// Everything of a chunk that needs no state: a block a (chunk, value head), a warp 16 of its
// tokens.
//
// With G the sums of log-decays over a tile of 16 tokens from its first token on and A those over
// the whole tile, the decay from token j to token i is e^(G_i - G_j) within a tile and e^G_i e^(A -
// G_j) times the A between them across tiles. Across tiles no factor exceeds 1. Within one they are
// e^G_i and e^-G_j, which fp32 and bf16 hold as long as A is above kSafe; a tile that forgets more
// is multiplied pair by pair from differences. See docs/algorithm.md.
#pragma once

#include "inverse.h"

namespace mate {
namespace gpu {

constexpr float kSafe =
    -116.0f;  // bits over 16 tokens: the bounded gate at its usual -5 keeps to it

// ---- operands of the products -------------------------------------------------------------------

// What the lane's channels decay by: sums over whole tiles, in bits.
struct Decays {
  Four tile, before, after;  // over this tile, those before it, those after it
  Four far;                  // of tile 1 for tile 0, of 2 for 3: between these and their far ones
};

MATE_DEVICE Decays find_decays(const PrepareShared& shared, int warp, const Four& tile) {
  const auto total = [&](int i) { return load_four(&shared.total[i][lane_channel()]); };
  Decays d = {tile, {}, {}, total(warp == 0 ? 1 : 2)};
  MATE_NO_UNROLL
  for (int i = 0; i < warp; ++i) d.before = d.before + total(i);
  MATE_NO_UNROLL
  for (int i = warp + 1; i < kTokenTiles; ++i) d.after = d.after + total(i);
  return d;
}

// Forms what a tile contributes, token by token: rows and columns of products into its shared
// memory, in place of what they are made of, and what `scan` reads. k_in and q_in read the state,
// k_out writes it.
//   near columns   k e^-G, for the tile itself; in `far`: k e^(A-G), for the tiles after it
//   rows           k e^G, q e^G
// Tokens 32..63 meet 0..31 in one step, with the decays of tiles 1 and 2 on the outer ones' side:
// in `extra` and the last tile's `far`.
template <int32_t kDtype>
MATE_DEVICE void form_operands(const Tokens& t, const Decays& decays, bool by_pairs,
                               PrepareShared& shared, Operands& out) {
  const int warp = t.first / kBlock, channel = lane_channel();
  TileShared& tile = shared.tile[warp];
  uint16_t* const extra = shared.extra[warp == 0 ? 0 : 1];
  const Four over_tile = fast_exp2(decays.tile), before = fast_exp2(decays.before),
             after = fast_exp2(decays.after), far = fast_exp2(decays.far);
  uint16_t* const panel = OperandRows{out.rows}.panel(channel).at(t.first, 0);
  FourRows<kDim> rows(channel);
  FourRows<kPanel> out_rows(channel % kPanel);
  MATE_NO_UNROLL
  for (int first = 0; first < kBlock; first += kStep, rows.advance(), out_rows.advance()) {
    Four sums[kStep];
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) sums[r] = load_four(lane_sums(tile, first + r));
    const Four k_norm = load_four(&shared.k_norm[t.first + first]);
    const Four q_norm = load_four(&shared.q_norm[t.first + first]);
    MATE_WARP_BARRIER();  // columns go to where other lanes' sums were
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      const auto at = [&](const uint16_t* matrix) { return rows.at(matrix, r); };
      const Four G = sums[r], in = fast_exp2(G);
      const Four k = unpack_four<kDtype>(at(tile.k)) * k_norm.x[r];
      const Four q = unpack_four<kDtype>(at(tile.q)) * q_norm.x[r];
      const Four k_in = k * in, q_in = q * in, near = k * fast_exp2(-G);
      Four k_out = near * over_tile;
      if (by_pairs) k_out = k * fast_exp2(decays.tile - G);  // e^-G may be Inf
      store_bf16(at(tile.k), k_in);
      store_bf16(at(tile.q), q_in);
      store_bf16(at(tile.near), near);
      if (warp < 3) {
        store_bf16(at(tile.far), k_out);
        if (warp == 0) store_bf16(at(extra), k_out * far);
      } else {
        store_bf16(at(tile.far), k_in * far);
        store_bf16(at(extra), q_in * far);
      }
      uint16_t* row = out_rows.at(panel, r);
      store_bf16(row, k_in * before);
      store_bf16(row + kChunk * kPanel, q_in * before);
      store_bf16(row + 2 * kChunk * kPanel, k_out * after);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// Between tokens of two tiles: L_ij = <k_i, k_j>, P_ij = <q_i, k_j>, decays included.
struct TileProducts {
  FragC L, P;
};

template <class RowsK, class RowsQ, class ColumnsK>
MATE_DEVICE TileProducts multiply_tiles(const RowsK& k, const RowsQ& q, const ColumnsK& columns) {
  TileProducts c = {};
  MATE_UNROLL
  for (int i = 0; i < kDim; i += kBlock) {
    const FragB b = load_b_columns(columns, 0, i);
    multiply(c.L, load_a(k, 0, i), b);
    multiply(c.P, load_a(q, 0, i), b);
  }
  return c;
}

// Those of a tile with itself, from differences: of any gates, but slowly.
template <int32_t kDtype>
MATE_DEVICE TileProducts multiply_pairs(const Tokens& t, const PrepareShared& shared) {
  const TileShared& tile = shared.tile[t.first / kBlock];
  const int channel = lane_channel();
  const auto row = [&](const uint16_t* matrix, int i) {
    return unpack_four<kDtype>(Tile<kDim>{matrix}.at(i, channel));
  };
  TileProducts c = {};
  MATE_NO_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    const Four k_i = row(tile.k, i) * shared.k_norm[t.first + i];
    const Four q_i = row(tile.q, i) * shared.q_norm[t.first + i];
    const Four G_i = load_four(lane_sums(tile, i));
    MATE_NO_UNROLL
    for (int j = 0; j <= i; ++j) {
      const Four k_j = row(tile.k, j) * shared.k_norm[t.first + j] *
                       fast_exp2(G_i - load_four(lane_sums(tile, j)));
      float l = 0.0f, p = 0.0f;
      MATE_UNROLL
      for (int n = 0; n < kLane; ++n) {
        l += k_i.x[n] * k_j.x[n];
        p += q_i.x[n] * k_j.x[n];
      }
      MATE_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        l += shuffle_xor(l, mask);
        p += shuffle_xor(p, mask);
      }
      MATE_UNROLL
      for (int v = 0; v < 8; ++v) {
        if (row_of(v) != i || column_of(v) != j) continue;
        c.L.x[v] = l;
        c.P.x[v] = p;
      }
    }
  }
  return c;
}

// A tile off the diagonal.
MATE_DEVICE void store_products(PrepareShared& shared, int i, int j, const TileProducts& c) {
  const int row = i * kBlock, column = j * kBlock;
  const Split L = split(c.L);
  store_c_rows(L.high, Tile<kChunk>{shared.L_high}, row, column);
  store_c_rows(L.low, Tile<kChunk>{shared.L_low}, row, column);
  store_c_rows(rounded(c.P).both, Tile<kChunk>{shared.P}, row, column);
}

MATE_DEVICE void store_diagonal(PrepareShared& shared, int i, TileProducts& c) {
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    shared.L[i][row_of(v)][column_of(v)] = c.L.x[v];
    if (row_of(v) < column_of(v)) c.P.x[v] = 0.0f;
  }
  store_c_rows(rounded(c.P).both, Tile<kChunk>{shared.P}, i * kBlock, i * kBlock);
}

MATE_DEVICE bool any_below(const Four& x, float bound) {
  float least = x.x[0];
  MATE_UNROLL
  for (int c = 1; c < kLane; ++c) least = fminf(least, x.x[c]);
  MATE_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) least = fminf(least, shuffle_xor(least, mask));
  return least < bound;
}

// ---- the kernel ---------------------------------------------------------------------------------

template <int32_t kDtype>
MATE_DEVICE void prepare_chunk(const Params& p) {
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(shared_memory());
  const auto block = static_cast<uint32_t>(block_index());  // 32 bits divide faster
  const auto heads = static_cast<uint32_t>(p.args.heads_v);
  const int64_t chunk = p.prepare_begin + block / heads;
  const int64_t n = sequence_of(p, chunk);
  if (n >= p.args.num_seqs) return;
  const Sequence sequence = sequence_at(p, n);
  const int warp = thread_index() / 32, first = warp * kBlock;
  const int64_t token = sequence.begin + (chunk - sequence.first_chunk) * kChunk + first;
  const int64_t left = sequence.end - token;
  const int count = static_cast<int>(left < 0 ? 0 : left < kBlock ? left : kBlock);
  const Tokens t = {token, static_cast<uint32_t>(sequence.batch), block % heads, first, count};
  TileShared& tile = shared.tile[warp];
  const uint32_t round = static_cast<uint32_t>(chunk) / static_cast<uint32_t>(p.ring);
  const int64_t place = (chunk - static_cast<int64_t>(round) * p.ring) * heads + t.head;
  Operands& out = p.operands[place];

  const Scalars scalars = fetch_scalars(p, t);
  const RowPlaces places;
  if (p.args.g.dtype == MATE_FLOAT32) {
    fetch_g32(p, t, tile);
  } else {
    fetch_rows(p.args.g, p.g_aligned, t, t.head, places, tile.far);
  }
  copy_commit();
  const uint32_t head_qk = t.head / p.group;
  fetch_rows(p.args.q, p.q_aligned, t, head_qk, places, tile.q);
  fetch_rows(p.args.k, p.k_aligned, t, head_qk, places, tile.k);
  copy_commit();
  copy_wait<1>();
  MATE_WARP_BARRIER();
  const Four total = sum_gates<kDtype>(p, t, scalars, tile);
  store_four(&shared.total[warp][lane_channel()], total);
  copy_wait<0>();
  MATE_WARP_BARRIER();
  find_norms<kDtype>(p, t, shared);
  store_beta(p, t, scalars.beta, shared);
  if (kEarlyLaunches && wraps(p) && thread_index() == 0) {
    if (round == 0) {
      p.reads[place] = 0;
    } else {
      await_count(&p.reads[place], round * p.readers);
    }
  }
  MATE_BARRIER();

  const bool by_pairs = any_below(total, kSafe);
  TileProducts own, other[2];  // the first two warps have one other
  if (by_pairs) own = multiply_pairs<kDtype>(t, shared);
  const Decays decays = find_decays(shared, warp, total);
  form_operands<kDtype>(t, decays, by_pairs, shared, out);
  if (warp == 0) store_four(out.decay + lane_channel(), fast_exp2(decays.tile + decays.after));
  MATE_BARRIER();

  const Tile<kDim> k{tile.k}, q{tile.q};
  const auto columns = [&](int i) { return Tile<kDim>{shared.tile[i].far}; };
  if (!by_pairs) own = multiply_tiles(k, q, Tile<kDim>{tile.near});
  // Off the diagonal the first two warps take a tile each, {3, 2} and {1, 0}, the others two.
  const int row = warp == 0 ? 3 : warp;
  if (warp < 2) {
    const TileShared& of_row = shared.tile[row];
    other[0] = multiply_tiles(Tile<kDim>{of_row.k}, Tile<kDim>{of_row.q}, columns(row - 1));
  } else {
    const Tile<kDim> far_k = warp == 2 ? k : columns(3);
    const Tile<kDim> far_q = warp == 2 ? q : Tile<kDim>{shared.extra[1]};
    other[0] = multiply_tiles(far_k, far_q, Tile<kDim>{shared.extra[0]});
    other[1] = multiply_tiles(far_k, far_q, columns(1));
  }
  MATE_BARRIER();  // matrices go to where the operands were
  store_diagonal(shared, warp, own);
  if (warp < 2) {
    store_products(shared, row, row - 1, other[0]);
  } else {
    store_products(shared, row, 0, other[0]);
    store_products(shared, row, 1, other[1]);
  }
  MATE_WARP_BARRIER();
  invert(shared, warp, out);
  store_half(warp < 2 ? shared.T_low : shared.T_high, warp % 2, warp < 2 ? out.T_low : out.T_high);
}

// May run beside the launch before it, unless that is `plan`, and does not end before it: what
// comes behind waits for this launch alone.
template <int32_t kDtype>
MATE_KERNEL(kPrepareThreads, kPrepareBlocks)
prepare(const Params p) {
  const bool first = p.prepare_begin == 0;
  if (first) wait_for_before();
  let_next_begin();
  prepare_chunk<kDtype>(p);
  const int64_t last = (p.prepare_end - p.prepare_begin) * p.args.heads_v - 1;
  if (!first && block_index() == last) wait_for_before();
}

}  // namespace gpu
}  // namespace mate
