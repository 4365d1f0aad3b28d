// A warp's products with several tiles side by side. WarpProducts does them one by one and at once;
// an architecture may have products of a group of four warps (GroupProducts, with the same names),
// which read the right operand from shared memory once for all four and run on while the warps go
// on: between begin() and wait() nobody touches what takes part.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

struct WarpProducts {
  MATE_DEVICE static void begin() {}
  MATE_DEVICE static void commit() {}
  MATE_DEVICE static void publish() {}  // what this thread wrote to shared memory, to products
  template <int kInFlight>
  MATE_DEVICE static void wait() {}
  template <class Fragments>
  MATE_DEVICE static void settle(Fragments&) {}

  struct Memory {  // what the operands below lie in
    MATE_DEVICE explicit Memory(const void*) {}
  };

  // C[t][m][n] = sum over i, k of A[i][m][k] operands[16 t + n][16 i + k]; `operands`: OperandRows
  template <int kTiles>
  MATE_DEVICE static void columns(FragC (&c)[kTiles], const FragA (&a)[8], const uint16_t* operands,
                                  const Memory&) {
    MATE_UNROLL
    for (int t = 0; t < kTiles; ++t) c[t] = FragC{};
    MATE_UNROLL
    for (int k = 0; k < 8; ++k) {
      MATE_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        multiply(c[t], a[k], load_b_columns(OperandRows{operands}, t * kBlock, k * kBlock));
      }
    }
  }

  // C = the same with the sum of `kMatrices` matrices of lower tiles, tile column by tile column, 4
  // tiles of each. The tiles above the diagonal are zeros if kWholeMatrices, else never read.
  static constexpr bool kWholeMatrices = false;
  template <int kMatrices>
  MATE_DEVICE static void lower(FragC (&c)[4], const FragA (&a)[4], const uint16_t* tiles,
                                const Memory&) {
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) c[t] = FragC{};
    MATE_UNROLL
    for (int k = 0; k < 4; ++k) {
      MATE_UNROLL
      for (int i = 0; i < kMatrices; ++i) {
        const Tile<kBlock> column{tiles + (k * kMatrices + i) * 4 * kTileSize};
        MATE_UNROLL
        for (int t = k; t < 4; ++t) multiply(c[t], a[k], load_b_columns(column, t * kBlock, 0));
      }
    }
  }

  // The result of lower<2>.
  struct Corrected {
    FragC c[4];
    MATE_DEVICE FragC tile(int t) const { return c[t]; }
  };

  // C[t][m][n] += sum over i, k of A[i][m][k] operands[row + 16 i + k][16 t + n], where A = high +
  // low, the latter formed by form_low()
  template <class FormLow>
  MATE_DEVICE static void rows(FragC (&c)[8], const FragA (&high)[4], FragA (&low)[4],
                               const FormLow& form_low, const uint16_t* operands, int row,
                               const Memory&) {
    form_low();
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      MATE_UNROLL
      for (int first = 0; first < 8; first += 4) {  // independent ones between those that are not
        FragB b[4];
        MATE_UNROLL
        for (int t = 0; t < 4; ++t) {
          b[t] = load_b_rows(OperandRows{operands}, row + i * kBlock, (first + t) * kBlock);
          multiply(c[first + t], low[i], b[t]);
        }
        MATE_UNROLL
        for (int t = 0; t < 4; ++t) multiply(c[first + t], high[i], b[t]);
      }
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
