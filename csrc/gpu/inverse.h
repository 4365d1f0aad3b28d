// T = (I + diag(b) L)^-1 diag(b): what the delta rule writes is T times its error.
#pragma once

#include "load.h"

namespace mate {
namespace gpu {

// A warp's tile on the diagonal. Both its halves by forward substitution, a lane a column; then the
// corner between them, -T_right L_corner T_left, half of it in place of what L has above.
MATE_DEVICE void solve_diagonal(PrepareShared& shared, int block) {
  constexpr int kSide = kBlock / 2;
  auto& L = shared.L[block];
  auto& T = shared.T[block];
  const float* const beta = shared.beta + block * kBlock;
  if (lane_index() < kBlock) {
    const int first = lane_index() / kSide * kSide, column = lane_index() % kSide;
    float x[kSide];
    MATE_UNROLL
    for (int i = 0; i < kSide; ++i) {
      float sum = i == column ? 1.0f : 0.0f;
      MATE_UNROLL
      for (int m = 0; m < i; m += 4) {
        const Four row = load_four(&L[first + i][first + m]);
        MATE_UNROLL
        for (int n = 0; n < 4; ++n) {
          if (m + n < i) sum -= row.x[n] * x[m + n];
        }
      }
      x[i] = sum * beta[first + i];
      T[first + i][first + column] = x[i];
      if (first == 0) T[i][kSide + column] = 0.0f;
    }
  }
  MATE_WARP_BARRIER();
  // A row of it, and two columns.
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
  const auto multiply_row = [](const float* a, const float* b) {
    Pair sum = {0.0f, 0.0f};
    MATE_UNROLL
    for (int m = 0; m < kSide; m += 4) {
      const Four four = load_four(a + m);
      MATE_UNROLL
      for (int n = 0; n < 4; ++n) {
        const Pair two = *reinterpret_cast<const Pair*>(b + (m + n) * kBlock);
        sum.x += four.x[n] * two.x;
        sum.y += four.x[n] * two.y;
      }
    }
    return sum;
  };
  float* const half = &L[row][kSide + column];
  *reinterpret_cast<Pair*>(half) = multiply_row(&L[kSide + row][0], &T[0][column]);
  MATE_WARP_BARRIER();
  const Pair corner = multiply_row(&T[kSide + row][kSide], &L[0][kSide + column]);
  *reinterpret_cast<Pair*>(&T[kSide + row][column]) = {-corner.x, -corner.y};
}

// Its result in two terms, to where products read it: half a row a lane.
MATE_DEVICE void split_diagonal(PrepareShared& shared, int block) {
  const int row = lane_index() / 2, half = lane_index() % 2 * 8;
  Eight high, low;
  MATE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const Four x = load_four(&shared.T[block][row][half + i * 2]);
    split_pair(x.x[0], x.x[1], high.x[i], low.x[i]);
    split_pair(x.x[2], x.x[3], high.x[i + 1], low.x[i + 1]);
  }
  const int at = Tile<kChunk>::place(block * kBlock + row, block * kBlock + half);
  *reinterpret_cast<Eight*>(shared.T_high + at) = high;
  *reinterpret_cast<Eight*>(shared.T_low + at) = low;
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
  return {to_operand(c, scratch), to_operand(rest_of(c), scratch)};
}

// The tile {i, j} of a matrix.
MATE_DEVICE SplitA load_split_a(const uint16_t* high, const uint16_t* low, int i, int j) {
  return {load_a(Tile<kChunk>{high}, i * kBlock, j * kBlock),
          load_a(Tile<kChunk>{low}, i * kBlock, j * kBlock)};
}
MATE_DEVICE SplitB load_split_b(const uint16_t* high, const uint16_t* low, int i, int j) {
  return {load_b_rows(Tile<kChunk>{high}, i * kBlock, j * kBlock),
          load_b_rows(Tile<kChunk>{low}, i * kBlock, j * kBlock)};
}

// The corner of T between the kTiles tiles of tokens from `left` on and as many after them, by
// block doubling: -T_right L_corner T_left. A warp a tile {i, j}; no powers of L, which would
// cancel.
template <int kTiles>
MATE_DEVICE void fill_corner(PrepareShared& shared, int left, int i, int j) {
  const int right = left + kTiles;
  FragC corner = {};
  MATE_NO_UNROLL
  for (int n = j; n < kTiles; ++n) {
    FragC c = {};
    MATE_NO_UNROLL
    for (int m = 0; m <= i; ++m) {
      multiply(c, load_split_a(shared.T_high, shared.T_low, right + i, right + m),
               load_split_b(shared.L_high, shared.L_low, right + m, left + n));
    }
    multiply(corner, to_split_operand(c, shared.scratch + thread_index() / 32 * kScratch),
             load_split_b(shared.T_high, shared.T_low, left + n, left + j));
  }
  MATE_UNROLL
  for (float& x : corner.x) x = -x;
  const Split s = split(corner);
  const int row = (right + i) * kBlock, column = (left + j) * kBlock;
  store_c_rows(s.high, Tile<kChunk>{shared.T_high}, row, column);
  store_c_rows(s.low, Tile<kChunk>{shared.T_low}, row, column);
}

// Half of a matrix, the rows of tiles {0, 3} or {1, 2}: five tiles, a lane half a row of each.
MATE_DEVICE void store_half(const uint16_t* from, int which, uint16_t* to) {
  const int row = lane_index() / 2, half = lane_index() % 2 * 8;
  MATE_UNROLL
  for (int i = 0; i <= kTokenTiles; ++i) {
    const bool upper = i <= which;
    const int tile = upper ? which : kTokenTiles - 1 - which, column = upper ? i : i - 1 - which;
    *reinterpret_cast<Eight*>(to + lower_tile(tile, column) * kTileSize +
                              Tile<kBlock>::place(row, half)) =
        *reinterpret_cast<const Eight*>(
            Tile<kChunk>{from}.in_block(tile * kBlock, column * kBlock, row, half));
  }
}

// `out`: for P, which is known before T.
MATE_DEVICE void invert(PrepareShared& shared, int warp, Operands& out) {
  solve_diagonal(shared, warp);
  MATE_WARP_BARRIER();
  split_diagonal(shared, warp);
  MATE_BARRIER();
  if (warp < 2) {
    fill_corner<1>(shared, warp * 2, 0, 0);
  } else {
    store_half(shared.P, warp % 2, out.P);
  }
  MATE_BARRIER();
  fill_corner<2>(shared, 0, warp / 2, warp % 2);
  MATE_BARRIER();
}

}  // namespace gpu
}  // namespace mate
