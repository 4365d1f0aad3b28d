// Fragments in the layout of mma.sync.m16n8k16, over its instructions: load_matrices (ldmatrix.x4),
// load_matrices_transposed (the same with .trans), store_matrices and store_matrices_transposed
// (stmatrix.x4, .trans) and mma_sync. Included by cuda.h, and by host.h to check the layout where
// there is no GPU.
#pragma once

namespace mate {
namespace gpu {

struct FragA {
  uint32_t x[4];  // row lane / 4 (+ 8 in 1 and 3), columns lane % 4 * 2 + 0..1 (+ 8 in 2 and 3)
};
struct FragB {
  uint32_t x[4];  // column lane / 4 (+ 8 in 2 and 3), rows lane % 4 * 2 + 0..1 (+ 8 in 1 and 3)
};
struct FragC {
  float x[8];
};
constexpr int kScratch = 0;
constexpr bool kNeighbours = true;

MATE_DEVICE int row_of(int v) { return lane_index() / 4 + v / 2 % 2 * 8; }
MATE_DEVICE int column_of(int v) { return lane_index() % 4 * 2 + v % 2 + v / 4 * 8; }

// The rows that a lane names of a 16 x 16 block: its four 8 x 8 matrices go down first, or across.
template <class Tile>
MATE_DEVICE uint16_t* down_first(const Tile& tile, int row, int column) {
  return tile.in_block(row, column, lane_index() % 16, lane_index() / 16 * 8);
}
template <class Tile>
MATE_DEVICE uint16_t* across_first(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  return tile.in_block(row, column, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
}

// A[m][k] = tile[row + m][column + k]
template <class Tile>
MATE_DEVICE FragA load_a(const Tile& tile, int row, int column) {
  FragA a;
  load_matrices(a.x, down_first(tile, row, column));
  return a;
}
// B[k][n] = tile[row + n][column + k]
template <class Tile>
MATE_DEVICE FragB load_b_columns(const Tile& tile, int row, int column) {
  FragB b;
  load_matrices(b.x, across_first(tile, row, column));
  return b;
}
// B[k][n] = A[n][k]
MATE_DEVICE FragB as_columns(const FragA& a) { return {{a.x[0], a.x[2], a.x[1], a.x[3]}}; }
// B[k][n] times factors[k]
MATE_DEVICE void scale_rows(FragB& b, const uint16_t* factors) {
  const uint32_t* two = reinterpret_cast<const uint32_t*>(factors) + lane_index() % 4;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) b.x[i] = multiply_bf16(b.x[i], two[i % 2 * 4]);
}
// B[k][n] = tile[row + k][column + n]
template <class Tile>
MATE_DEVICE FragB load_b_rows(const Tile& tile, int row, int column) {
  FragB b;
  load_matrices_transposed(b.x, down_first(tile, row, column));
  return b;
}
// C[m][n] = tile[row + n][column + m]; elements 2 i and 2 i + 1 in both[i]
template <class Tile>
MATE_DEVICE void load_c_columns(uint32_t (&both)[4], const Tile& tile, int row, int column) {
  load_matrices_transposed(both, across_first(tile, row, column));
}
// The reverse.
template <class Tile>
MATE_DEVICE void store_c_columns(const uint32_t (&both)[4], const Tile& tile, int row, int column) {
  store_matrices_transposed(both, across_first(tile, row, column));
}

// C[m][n] = tile[row + m][column + n]
template <class Tile>
MATE_DEVICE void store_c_rows(const uint32_t (&both)[4], const Tile& tile, int row, int column) {
  store_matrices(both, down_first(tile, row, column));
}

MATE_DEVICE void multiply(FragC& c, const FragA& a, const FragB& b) {
  mma_sync(c.x, a.x, b.x[0], b.x[1]);
  mma_sync(c.x + 4, a.x, b.x[2], b.x[3]);
}

// Here an accumulator has an operand's layout: registers are enough.
MATE_DEVICE FragA to_operand(const FragC& c, uint16_t*) {
  return {{pack_bf16(c.x[0], c.x[1]), pack_bf16(c.x[2], c.x[3]), pack_bf16(c.x[4], c.x[5]),
           pack_bf16(c.x[6], c.x[7])}};
}

}  // namespace gpu
}  // namespace mate
