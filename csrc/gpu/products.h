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

  // C[t][m][n] (+)= sum over k of A[m][k] in[16 t + n][column + k]
  using In = Panels<2 * kChunk>;
  MATE_DEVICE static void columns(FragC (&c)[8], bool add, const FragA& a, const In& in,
                                  int column) {
    MATE_UNROLL
    for (int t = 0; t < 8; ++t) {
      if (!add) c[t] = FragC{};
      multiply(c[t], a, load_b_columns(in, t * kBlock, column));
    }
  }

  // C = the same of all columns, with matrices of lower tiles: `kMatrices` of them tile column by
  // tile column, 4 tiles of each. The tiles above the diagonal are zeros if kWholeMatrices, else
  // never read.
  static constexpr bool kWholeMatrices = false;
  template <int kMatrices>
  MATE_DEVICE static void lower(FragC (&c)[4], const FragA (&a)[4], const uint16_t* tiles) {
    MATE_UNROLL
    for (int k = 0; k < 4; ++k) {
      MATE_UNROLL
      for (int i = 0; i < kMatrices; ++i) {
        const Tile<kBlock> column{tiles + (k * kMatrices + i) * 4 * kTileSize};
        MATE_UNROLL
        for (int t = k; t < 4; ++t) {
          if (k == 0 && i == 0) c[t] = FragC{};
          multiply(c[t], a[k], load_b_columns(column, t * kBlock, 0));
        }
      }
    }
  }

  // A product with T in two terms.
  struct Corrected {
    FragC c[4];
    MATE_DEVICE FragC tile(int t) const { return c[t]; }
  };
  MATE_DEVICE static void correct(Corrected& x, const FragA (&a)[4], const uint16_t* T) {
    lower<2>(x.c, a, T);
  }

  // C[t][m][n] += sum over k of A[m][k] out[row + k][16 t + n]
  using Out = Panels<kChunk>;
  MATE_DEVICE static void rows(FragC (&c)[8], const TwoTerms& a, const Out& out, int row) {
    MATE_UNROLL
    for (int first = 0; first < 8; first += 4) {  // independent products between those that are not
      FragB b[4];
      MATE_UNROLL
      for (int t = 0; t < 4; ++t) {
        b[t] = load_b_rows(out, row, (first + t) * kBlock);
        multiply(c[first + t], a.low, b[t]);
      }
      MATE_UNROLL
      for (int t = 0; t < 4; ++t) multiply(c[first + t], a.high, b[t]);
    }
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
