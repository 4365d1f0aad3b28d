// Fragments in the layout of mma.sync.m16n8k16, over its instructions: load_matrices (ldmatrix.x4),
// load_matrices_transposed (the same with .trans) and mma_sync. Included by cuda.h, and by host.h
// to check the layout where there is no GPU.
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

MATE_DEVICE int row_of(int v) { return lane_index() / 4 + v / 2 % 2 * 8; }
MATE_DEVICE int column_of(int v) { return lane_index() % 4 * 2 + v % 2 + v / 4 * 8; }

// A[m][k] = tile[row + m][column + k]
template <class Tile>
MATE_DEVICE FragA load_a(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragA a;
  load_matrices(a.x, tile.at(row + lane % 16, column + lane / 16 * 8));
  return a;
}
// B[k][n] = tile[row + n][column + k]
template <class Tile>
MATE_DEVICE FragB load_b_columns(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragB b;
  load_matrices(b.x, tile.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  return b;
}
// B[k][n] = tile[row + k][column + n]
template <class Tile>
MATE_DEVICE FragB load_b_rows(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragB b;
  load_matrices_transposed(b.x, tile.at(row + lane % 16, column + lane / 16 * 8));
  return b;
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
