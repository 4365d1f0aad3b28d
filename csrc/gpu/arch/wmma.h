// Fragments in the layout of MP31's product of 16 x 16 x 16, over one primitive:
//
//   wmma_16x16x16(c, a, b)     C += A B; c: 8 floats, a and b: 4 registers of two bf16 each
//
// Operands are K-major: two neighbours along k in a register. The accumulator lies differently from
// both of them, so that to_operand goes through shared memory. Included by musa.h, and by host.h to
// run it where there is no such GPU.
#pragma once

#include "mp31.h"

namespace mate {
namespace gpu {

struct FragA {
  uint32_t x[4];
};
struct FragB {
  uint32_t x[4];
};
struct FragC {
  float x[8];
};
constexpr int kScratch = 256;
constexpr bool kNeighbours = false;

MATE_DEVICE int row_of(int v) { return mp31::c_row(lane_index(), v); }
MATE_DEVICE int column_of(int v) { return mp31::c_column(lane_index(), v); }

// Register i of an operand whose row r lies in row row + r of a tile.
template <class Tile>
MATE_DEVICE uint32_t load_two(const Tile& tile, int row, int column, int i) {
  const int lane = lane_index();
  return *reinterpret_cast<const uint32_t*>(
      tile.in_block(row, column, mp31::operand_row(lane, 2 * i), mp31::operand_k(lane, 2 * i)));
}

// A[m][k] = tile[row + m][column + k]
template <class Tile>
MATE_DEVICE FragA load_a(const Tile& tile, int row, int column) {
  FragA a;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) a.x[i] = load_two(tile, row, column, i);
  return a;
}
// B[k][n] = tile[row + n][column + k]
template <class Tile>
MATE_DEVICE FragB load_b_columns(const Tile& tile, int row, int column) {
  FragB b;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) b.x[i] = load_two(tile, row, column, i);
  return b;
}
// B[k][n] = A[n][k]
MATE_DEVICE FragB as_columns(const FragA& a) { return {{a.x[0], a.x[1], a.x[2], a.x[3]}}; }
// B[k][n] times factors[k]
MATE_DEVICE void scale_rows(FragB& b, const uint16_t* factors) {
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int k = mp31::operand_k(lane_index(), 2 * i);
    b.x[i] = multiply_bf16(b.x[i], *reinterpret_cast<const uint32_t*>(factors + k));
  }
}
// B[k][n] = tile[row + k][column + n]
template <class Tile>
MATE_DEVICE FragB load_b_rows(const Tile& tile, int row, int column) {
  FragB b;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int v) {
      const int lane = lane_index();
      return uint32_t{
          *tile.in_block(row, column, mp31::operand_k(lane, v), mp31::operand_row(lane, v))};
    };
    b.x[i] = element(2 * i) | element(2 * i + 1) << 16;
  }
  return b;
}

// C[m][n] = tile[row + n][column + m]; elements 2 i and 2 i + 1 in both[i]
template <class Tile>
MATE_DEVICE void load_c_columns(uint32_t (&both)[4], const Tile& tile, int row, int column) {
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int v) {
      return uint32_t{*tile.in_block(row, column, column_of(v), row_of(v))};
    };
    both[i] = element(2 * i) | element(2 * i + 1) << 16;
  }
}
// The reverse.
template <class Tile>
MATE_DEVICE void store_c_columns(const uint32_t (&both)[4], const Tile& tile, int row, int column) {
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    *tile.in_block(row, column, column_of(v), row_of(v)) =
        static_cast<uint16_t>(both[v / 2] >> v % 2 * 16);
  }
}

// C[m][n] = tile[row + m][column + n]
template <class Tile>
MATE_DEVICE void store_c_rows(const uint32_t (&both)[4], const Tile& tile, int row, int column) {
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    *tile.in_block(row, column, row_of(v), column_of(v)) =
        static_cast<uint16_t>(both[v / 2] >> v % 2 * 16);
  }
}

MATE_DEVICE void multiply(FragC& c, const FragA& a, const FragB& b) {
  wmma_16x16x16(c.x, a.x, b.x);
}

MATE_DEVICE FragA to_operand(const FragC& c, uint16_t* scratch) {
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t both = pack_bf16(c.x[2 * i], c.x[2 * i + 1]);
    scratch[row_of(2 * i) * 16 + column_of(2 * i)] = static_cast<uint16_t>(both);
    scratch[row_of(2 * i + 1) * 16 + column_of(2 * i + 1)] = static_cast<uint16_t>(both >> 16);
  }
  MATE_WARP_BARRIER();
  FragA a;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int lane = lane_index();
    a.x[i] = *reinterpret_cast<const uint32_t*>(scratch + mp31::operand_row(lane, 2 * i) * 16 +
                                                mp31::operand_k(lane, 2 * i));
  }
  MATE_WARP_BARRIER();  // the next accumulator goes to the same place
  return a;
}

}  // namespace gpu
}  // namespace mate
