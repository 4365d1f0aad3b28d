// Everything of a chunk that needs no state: a block a (chunk, value head), a warp 16 of its
// tokens.
//
// With G the sums of log-decays from a tile's first token on, in bits, and A those over tiles, the
// decay from token j to token i is 2^G_i 2^-G_j times the A between them. Rows of products carry
// 2^G_i from a whole number of bits on, columns 2^(A - G_j) up to one, so that no factor exceeds
// sqrt 2 and what is between is a power of two, which columns are multiplied by without rounding. A
// tile's own rows meet its columns with 2^-A: fp32 and bf16 hold that as long as A is above kSafe;
// a tile that forgets more is multiplied pair by pair from differences. See docs/algorithm.md.
#pragma once

#include "inverse.h"

namespace mate {
namespace gpu {

// Bits over 16 tokens: the bounded gate at its usual -5 keeps to it.
constexpr float kSafe = -116.0f;

// ---- operands of the products -------------------------------------------------------------------

// What a lane's channels decay by, in bits: sums from the chunk's first token on. A tile's rows and
// columns count from the whole numbers next to where it begins and ends.
struct Decays {
  Four previous, begin, all;  // to where the tile before begins, to this one's begin; of all
  Four whole_begin, whole_end;

  MATE_DEVICE Four whole_tile() const { return whole_end - whole_begin; }
};

MATE_DEVICE Four whole(const Four& x) {
  constexpr float kShift = 0x1.8p23f;  // what is added to it is rounded to integers
  const Four shift = {{kShift, kShift, kShift, kShift}};
  return (x + shift) - shift;
}

MATE_DEVICE Decays find_decays(const PrepareShared& shared, int warp) {
  Decays d = {};
  const auto total = [&](int i) { return load_four(&shared.total[i][lane_channel()]); };
  MATE_NO_UNROLL
  for (int i = 0; i < warp; ++i) {
    d.previous = d.begin;
    d.begin = d.begin + total(i);
  }
  const Four end = d.begin + total(warp);  // as its neighbour reckons
  d.all = end;
  MATE_NO_UNROLL
  for (int i = warp + 1; i < kTokenTiles; ++i) d.all = d.all + total(i);
  d.whole_begin = whole(d.begin);
  d.whole_end = whole(end);
  return d;
}

// What columns are to be multiplied by: those of a tile, for its own rows; those two or three tiles
// before a row's.
MATE_DEVICE void store_factors(PrepareShared& shared, const Decays& d, int warp) {
  const int channel = lane_channel();
  const auto store = [&](uint16_t* factors, const Four& bits) {
    store_four(factors + channel, pack_four<MATE_BFLOAT16>(fast_exp2(bits)));
  };
  const Four tile = d.whole_tile();
  store(shared.own[warp], -tile);
  if (warp == 1) {
    store(shared.other[0], tile);
    store(shared.other[1], Four{});
  } else if (warp == 2) {
    store(shared.other[2], d.whole_end - whole(d.previous));
    store(shared.other[3], tile);
  }
}

// Forms what a tile contributes, token by token: rows and columns of products into its shared
// memory, in place of what they are made of, and what `scan` reads. k_in and q_in read the state,
// k_out writes it.
template <int32_t kDtype>
MATE_DEVICE void form_operands(const Tokens& t, float unit, const Decays& d, PrepareShared& shared,
                               Operands& out) {
  const int channel = lane_channel();
  TileShared& tile = shared.tile[t.first / kBlock];
  uint16_t* const panel = OperandRows{out.rows}.panel(channel).at(t.first, 0);
  FourRows<kDim> rows(channel);
  FourRows<kPanel> out_rows(channel % kPanel);
  const PackedFour before = pack_four<MATE_BFLOAT16>(fast_exp2(d.whole_begin));
  const Four after = fast_exp2(d.all - d.whole_end), bits = d.whole_tile();
  Four G = d.begin - d.whole_begin;
  MATE_NO_UNROLL
  for (int first = 0; first < kBlock; first += kStep, rows.advance(), out_rows.advance()) {
    const Four k_norm = load_four(&shared.k_norm[t.first + first]);
    const Four q_norm = load_four(&shared.q_norm[t.first + first]);
    PackedFour g_bits[kStep], k_bits[kStep], q_bits[kStep];
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) {  // all that is read before all that is written
      g_bits[r] = load_packed(rows.at(tile.g, r));
      k_bits[r] = load_packed(rows.at(tile.k, r));
      q_bits[r] = load_packed(rows.at(tile.q, r));
    }
    MATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      const auto at = [&](uint16_t* matrix) { return rows.at(matrix, r); };
      G = G + unpack_four<MATE_FLOAT16>(g_bits[r]) * unit;
      const Four in = fast_exp2(G), k = unpack_four<kDtype>(k_bits[r]) * k_norm.x[r];
      const Four q = unpack_four<kDtype>(q_bits[r]) * q_norm.x[r];
      const PackedFour k_in = pack_four<MATE_BFLOAT16>(k * in);
      const PackedFour q_in = pack_four<MATE_BFLOAT16>(q * in);
      const Four k_out = k * fast_exp2(bits - G);
      store_four(at(tile.k), k_in);
      store_four(at(tile.q), q_in);
      store_four(at(tile.g), pack_four<MATE_BFLOAT16>(k_out));
      uint16_t* row = out_rows.at(panel, r);
      store_four(row, k_in * before);
      store_four(row + kChunk * kPanel, q_in * before);
      store_four(row + 2 * kChunk * kPanel, pack_four<MATE_BFLOAT16>(k_out * after));
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// Between tokens of two tiles: L_ij = <k_i, k_j>, P_ij = <q_i, k_j>, decays included.
struct TileProducts {
  FragC L, P;
};

struct Columns {
  const uint16_t *tile, *factors;
};

// Of one tile's rows with columns of kCount.
template <bool kScaled, int kCount>
MATE_DEVICE void multiply_tiles(TileProducts* c, const TileShared& rows,
                                const Columns (&columns)[kCount]) {
  MATE_UNROLL
  for (int n = 0; n < kCount; ++n) c[n] = TileProducts{};
  MATE_UNROLL
  for (int i = 0; i < kDim; i += kBlock) {
    const FragA k = load_a(Tile<kDim>{rows.k}, 0, i), q = load_a(Tile<kDim>{rows.q}, 0, i);
    MATE_UNROLL
    for (int n = 0; n < kCount; ++n) {
      FragB b = load_b_columns(Tile<kDim>{columns[n].tile}, 0, i);
      if (kScaled) scale_rows(b, columns[n].factors + i);
      multiply(c[n].L, k, b);
      multiply(c[n].P, q, b);
    }
  }
}

// Those of a tile with itself, from differences: of any gates, but slowly.
template <int32_t kDtype>
MATE_DEVICE TileProducts multiply_pairs(const Tokens& t, float unit, const PrepareShared& shared) {
  const TileShared& tile = shared.tile[t.first / kBlock];
  const int channel = lane_channel();
  const auto row = [&](const uint16_t* matrix, int i) { return Tile<kDim>{matrix}.at(i, channel); };
  TileProducts c = {};
  MATE_NO_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    const Four k_i = unpack_four<kDtype>(row(tile.k, i)) * shared.k_norm[t.first + i];
    const Four q_i = unpack_four<kDtype>(row(tile.q, i)) * shared.q_norm[t.first + i];
    Four between = {};
    MATE_NO_UNROLL
    for (int j = i; j >= 0; --j) {
      const Four k_j =
          unpack_four<kDtype>(row(tile.k, j)) * shared.k_norm[t.first + j] * fast_exp2(between);
      between = between + unpack_four<MATE_FLOAT16>(row(tile.g, j)) * unit;
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

// ---- the kernel ---------------------------------------------------------------------------------

template <int32_t kDtype>
MATE_DEVICE void prepare_chunk(const Params& p) {
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(shared_memory());
  const auto block = static_cast<uint32_t>(block_index());
  const uint32_t chunk_of_launch = p.heads.quotient(block);
  const uint32_t head = p.heads.rest(block, chunk_of_launch);
  const uint32_t chunk = static_cast<uint32_t>(p.prepare_begin) + chunk_of_launch;
  const ChunkTokens tokens = tokens_of(p, chunk);
  if (tokens.count == 0) return;
  const int warp = thread_index() / 32, first = warp * kBlock;
  const int left = tokens.count - first, count = left < 0 ? 0 : left < kBlock ? left : kBlock;
  const uint32_t batch = p.args.cu_seqlens ? 0 : static_cast<uint32_t>(tokens.sequence);
  const Tokens t = {tokens.begin + first, batch, head, first, count};
  TileShared& tile = shared.tile[warp];
  const uint32_t round = p.rings.quotient(chunk);
  const int64_t place = int64_t{p.rings.rest(chunk, round)} * p.heads.by + head;
  Operands& out = p.operands[place];

  if (lane_index() == 0) shared.forgets[warp] = false;
  WideGates wide(p, t);
  const RowPlaces places;
  if (p.args.g.dtype != MATE_FLOAT32) {
    fetch_rows(p.args.g, p.g_aligned, t, t.head, places, tile.g);
  }
  copy_commit();
  const Scalars scalars = fetch_scalars(p, t);
  const uint32_t head_qk = p.group.quotient(head);
  fetch_rows(p.args.q, p.q_aligned, t, head_qk, places, tile.q);
  fetch_rows(p.args.k, p.k_aligned, t, head_qk, places, tile.k);
  copy_commit();
  copy_wait<1>();
  MATE_WARP_BARRIER();
  const Four total = sum_gates<kDtype>(p, t, scalars, wide, tile);
  store_four(&shared.total[warp][lane_channel()], total);
  const float least = fminf(fminf(total.x[0], total.x[1]), fminf(total.x[2], total.x[3]));
  if (least < kSafe) shared.forgets[warp] = true;
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

  const float unit = kept_unit(p);
  const bool by_pairs = shared.forgets[warp];
  TileProducts c[3], pairs;  // two off the diagonal, or one; the one on it
  if (by_pairs) pairs = multiply_pairs<kDtype>(t, unit, shared);
  const Decays decays = find_decays(shared, warp);
  store_factors(shared, decays, warp);
  form_operands<kDtype>(t, unit, decays, shared, out);
  if (warp == 0) store_four(out.decay + lane_channel(), fast_exp2(decays.all));
  MATE_BARRIER();

  // Off the diagonal the first two warps take a tile each, {3, 2} and {1, 0}, the others two.
  const int row = warp == 0 ? 3 : warp;
  const Columns own = {tile.g, shared.own[warp]};
  if (warp < 2) {
    multiply_tiles<false, 1>(c, shared.tile[row], {{shared.tile[row - 1].g, nullptr}});
    multiply_tiles<true, 1>(c + 2, tile, {own});
  } else {
    const uint16_t* const factors = shared.other[(warp - 2) * 2];
    multiply_tiles<true, 3>(c, tile,
                            {{shared.tile[0].g, factors}, {shared.tile[1].g, factors + kDim}, own});
  }
  if (by_pairs) c[2] = pairs;
  MATE_BARRIER();  // matrices go to where the operands were
  store_diagonal(shared, warp, c[2]);
  if (warp < 2) {
    store_products(shared, row, row - 1, c[0]);
  } else {
    store_products(shared, row, 0, c[0]);
    store_products(shared, row, 1, c[1]);
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
