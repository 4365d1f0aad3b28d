// Everything of a chunk that needs no state: a block a (chunk, value head).
//
// Decays are products of e = exp(a) along a binary tree over the chunk's tokens, so that no factor
// exceeds 1 (docs/algorithm.md). At level s the tokens form blocks of 2s: a key j in a left half
// meets the keys and queries i in the same block's right half, with the decay between them in two
// factors, `in` (from the middle to i) and `out` (from j to the middle). Every level has 32 rows
// and 32 columns, so that one routine of products serves them all.
#pragma once

#include "inverse.h"

namespace mate {
namespace gpu {

// ---- the tree -----------------------------------------------------------------------------------

template <int32_t kDtype>
MATE_DEVICE Pair raw(const uint16_t* matrix, int token, int channel) {
  return unpack<kDtype>(*reinterpret_cast<const uint32_t*>(matrix + token * kDim + channel));
}

// Rows and columns of level kHalf's products, in the order of their tokens.
template <int kHalf, int32_t kDtype>
MATE_DEVICE void form_operands(const Factors& f, PrepareShared& shared) {
  MATE_UNROLL
  for (int i = 0; i < kRun; ++i) {
    const int token = f.first + i;
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
  if (warp >= (kHalf == kHalfChunk ? 8 : 4)) return;  // else tiles off the diagonal join no block
  FragC c = {};
  MATE_NO_UNROLL  // the factors take most registers
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
  if (kHalf < kRun) {
    MATE_UNROLL
    for (int left = 0; left < kRun; left += 2 * kHalf) {
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
  constexpr int kSpan = kHalf < kRun ? 1 : kHalf / kRun;  // runs
  const int half = f.first / kHalf;
  MATE_UNROLL
  for (int c = 0; c < 2; ++c) {
    float e = 1.0f;
    MATE_UNROLL
    for (int i = 0; i < kSpan; ++i) e *= shared.total[(half ^ 1) * kSpan + i][f.channel + c];
    MATE_UNROLL
    for (int i = 0; i < kRun; ++i) {
      if (half % 2) {
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
  if (2 * kHalf == kRun) {  // read after the next level's barriers
    shared.total[f.first / kRun][f.channel] = f.in[kRun - 1][0];
    shared.total[f.first / kRun][f.channel + 1] = f.in[kRun - 1][1];
  }
}

// ---- results ------------------------------------------------------------------------------------

// In bf16; what would suffer, `scan` makes good by taking V' in two terms where it writes the
// state.
template <int32_t kDtype>
MATE_DEVICE void store_factors(const Factors& f, const PrepareShared& shared, Operands& out) {
  MATE_UNROLL
  for (int i = 0; i < kRun; ++i) {
    const int token = f.first + i, at = Tile<kDim>::place(token, f.channel);
    const Pair k = raw<kDtype>(shared.k, token, f.channel);
    const Pair q = raw<kDtype>(shared.q, token, f.channel);
    const float k_norm = shared.k_norm[token], q_norm = shared.q_norm[token];
    store_pair(out.k_in + at, pack_bf16(k.x * f.in[i][0] * k_norm, k.y * f.in[i][1] * k_norm));
    store_pair(out.q_in + at, pack_bf16(q.x * f.in[i][0] * q_norm, q.y * f.in[i][1] * q_norm));
    const float x = k.x * f.out[i][0], y = k.y * f.out[i][1];
    store_pair(out.k_out + at, pack_bf16(x, y));
  }
}

MATE_DEVICE void store_matrices(const PrepareShared& shared, Operands& out) {
  for (int i = thread_index(); i < kChunk * kChunk / 8; i += kPrepareThreads) {
    const int row = i / (kChunk / 8), piece = i % (kChunk / 8);
    if (piece / 2 > row / kBlock) continue;
    const int number = lower_tile(row / kBlock, piece / 2);
    const auto copy = [&](const uint16_t* from, uint16_t* to) {
      const Tile<kChunk> tile{const_cast<uint16_t*>(from)};
      *reinterpret_cast<Eight*>(Tile<kBlock>{to + number * kTileSize}.at(
          row % kBlock, piece % 2 * 8)) = *reinterpret_cast<const Eight*>(tile.at(row, piece * 8));
    };
    copy(shared.T_high, out.T_high);
    copy(shared.T_low, out.T_low);
    copy(shared.P, out.P);
  }
}

template <int32_t kDtype>
MATE_KERNEL(kPrepareThreads, kPrepareBlocks)
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
  f.first = thread_index() / (kDim / 2) * kRun;
  f.channel = thread_index() % (kDim / 2) * 2;
  clear_P(shared);
  load_qk<kDtype>(p, work, shared);
  load_beta(p, work, shared);
  load_gates(p, work, f, shared);
  MATE_BARRIER();
  MATE_UNROLL
  for (int i = 0; i < kRun; ++i) {
    f.out[i][0] = f.out[i][1] = shared.k_norm[f.first + i];
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
    for (int i = 0; i < kRuns; ++i) sum += shared.sum[i][thread_index()];
    out.decay[thread_index()] = fast_exp(sum);
  }
  invert(shared);
  store_matrices(shared, out);
}

}  // namespace gpu
}  // namespace mate
