// A warp's products with several tiles side by side. WarpProducts does them one by one and at once;
// an architecture may have products of a group of four warps (GroupProducts, with the same names),
// which read the right operand from shared memory once for all four and run on while the warps go
// on: between begin() and wait() nobody touches what takes part.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

// A left operand in two bf16 terms.
struct TwoTerms {
  FragA high, low;
};
MATE_DEVICE TwoTerms in_two_terms(const FragC& c, uint16_t* scratch) {
  FragC rest;
  MATE_UNROLL
  for (int v = 0; v < 8; v += 2) {
    const uint32_t high = pack_bf16(c.x[v], c.x[v + 1]);
    rest.x[v] = c.x[v] - from_bits(high << 16);
    rest.x[v + 1] = c.x[v + 1] - from_bits(high & 0xffff0000u);
  }
  return {to_operand(c, scratch), to_operand(rest, scratch)};
}

struct WarpProducts {
  MATE_DEVICE static void begin() {}
  MATE_DEVICE static void commit() {}
  MATE_DEVICE static void publish() {}  // what this thread wrote to shared memory, to products
  template <int kInFlight>
  MATE_DEVICE static void wait() {}
  template <class Fragments>
  MATE_DEVICE static void settle(Fragments&) {}

  using Matrix = Panels<kChunk>;

  // C[t][m][n] (+)= sum over k of A[m][k] tile[16 t + n][column + k]
  MATE_DEVICE static void columns(FragC (&c)[4], bool add, const FragA& a, const Matrix& tile,
                                  int column) {
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) {
      if (!add) c[t] = FragC{};
      multiply(c[t], a, load_b_columns(tile, t * kBlock, column));
    }
  }

  // The same with a matrix of tiles [4 columns][4 rows], lower ones. The others are zeros if
  // kWholeMatrices, else never read.
  static constexpr bool kWholeMatrices = false;
  MATE_DEVICE static void lower(FragC (&c)[4], bool add, const FragA (&a)[4],
                                const uint16_t* matrix) {
    MATE_UNROLL
    for (int k = 0; k < 4; ++k) {
      MATE_UNROLL
      for (int t = k; t < 4; ++t) {
        if (!add && k == 0) c[t] = FragC{};
        const Tile<kBlock> column{matrix + k * 4 * kTileSize};
        multiply(c[t], a[k], load_b_columns(column, t * kBlock, 0));
      }
    }
  }

  // C[t][m][n] += sum over k of A[m][k] tile[row + k][column + 16 t + n], for 4 t
  template <class Tile>
  MATE_DEVICE static void rows(FragC* c, const TwoTerms& a, const Tile& tile, int row, int column) {
    FragB b[4];
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) {
      b[t] = load_b_rows(tile, row, column + t * kBlock);
      multiply(c[t], a.low, b[t]);
    }
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) multiply(c[t], a.high, b[t]);
  }
};

}  // namespace gpu
}  // namespace mate

#if defined(MATE_HAS_GROUP_PRODUCTS)
#include "arch/wgmma.h"
#else
namespace mate {
namespace gpu {
using GroupProducts = WarpProducts;
}  // namespace gpu
}  // namespace mate
#endif
