// T = (I + diag(b) L)^-1 diag(b): what the delta rule writes is T times its error.
#pragma once

#include "load.h"

namespace mate {
namespace gpu {

MATE_DEVICE void store_split(PrepareShared& shared, int i, int j, float x) {
  const uint16_t high = to_bf16(x);
  *Tile<kChunk>{shared.T_high}.at(i, j) = high;
  *Tile<kChunk>{shared.T_low}.at(i, j) = to_bf16(x - from_bits(uint32_t{high} << 16));
}

// The tiles on the diagonal, by forward substitution: a thread a column.
MATE_DEVICE void solve_diagonal(PrepareShared& shared) {
  if (thread_index() >= kChunk) return;
  const int block = thread_index() / kBlock, column = thread_index() % kBlock;
  float x[kBlock];
  MATE_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    float sum = i == column ? 1.0f : 0.0f;
    MATE_UNROLL
    for (int m = 0; m < i; ++m) sum -= shared.L[block][i][m] * x[m];
    x[i] = sum * shared.beta[block * kBlock + i];
    store_split(shared, block * kBlock + i, block * kBlock + column, x[i]);
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

}  // namespace gpu
}  // namespace mate
