// Products of a group of four warps: wgmma of sm_90a. Four warps with 16 rows each make its 64, and
// each warp's part of its accumulator is that of mma.sync's tiles side by side. The right operand
// lies in shared memory as a descriptor tells: rows of 128 bytes, whose pieces of 16 are permuted
// as Tile permutes them.
#pragma once

namespace mate {
namespace gpu {

// Where a right operand lies: rows of 128 bytes, or of 32, in groups of 8.
struct Place {
  uint32_t address, layout;

  MATE_DEVICE uint64_t at(int elements) const {
    return static_cast<uint64_t>(layout) << 32 | (address + elements / 8);
  }
};

// A piece of shared memory with operands at places known to the compiler. All lanes of a warp agree
// on where it is, which the compiler is told once.
struct OperandMemory {
  const void* data;
  uint32_t address;  // in units of 16 bytes

  MATE_DEVICE explicit OperandMemory(const void* data)
      : data(data), address(__shfl_sync(0xffffffffu, (shared_address(data) & 0x3ffffu) >> 4, 0)) {}

  // `panel`: bytes from one panel to the next, where an operand has two
  MATE_DEVICE Place at(const uint16_t* matrix, uint32_t layout, uint32_t panel = 16) const {
    const auto offset = reinterpret_cast<const char*>(matrix) - static_cast<const char*>(data);
    return {address + static_cast<uint32_t>(offset) / 16 + (panel >> 4 << 16), layout};
  }
};
// Bytes from one group to the next in units of 16, and the code of the permutation.
constexpr uint32_t kRowsOf128 = 1024 >> 4 | 1u << 30, kRowsOf32 = 256 >> 4 | 3u << 30;

#define MATE_TILE(t)                                                                   \
  "+f"(c[t].x[0]), "+f"(c[t].x[1]), "+f"(c[t].x[2]), "+f"(c[t].x[3]), "+f"(c[t].x[4]), \
      "+f"(c[t].x[5]), "+f"(c[t].x[6]), "+f"(c[t].x[7])

#define MATE_RIGHT                                                                        \
  "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"(static_cast<int>(add)), \
      "n"(kTransposed)

// C (+)= A B; a row of the memory is one k if kTransposed, else one column. With A in registers 64
// columns take as long as 128. An accumulator may not be part of another's: ptxas would do one
// product after another.
template <int kTransposed>
MATE_DEVICE void group_multiply(FragC (&c)[4], bool add, const FragA& a, uint64_t b) {
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, %38;}"
      : MATE_TILE(0), MATE_TILE(1), MATE_TILE(2), MATE_TILE(3)
      : MATE_RIGHT);
}
template <int kTransposed>
MATE_DEVICE void group_multiply(FragC (&c)[8], bool add, const FragA& a, uint64_t b) {
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, %70;}"
      : MATE_TILE(0), MATE_TILE(1), MATE_TILE(2), MATE_TILE(3), MATE_TILE(4), MATE_TILE(5),
        MATE_TILE(6), MATE_TILE(7)
      : MATE_RIGHT);
}
#undef MATE_RIGHT
#undef MATE_TILE

struct GroupProducts {
  MATE_DEVICE static void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  MATE_DEVICE static void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  MATE_DEVICE static void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  template <int kInFlight>
  MATE_DEVICE static void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
  }
  // After wait(): from here on the compiler may use, move and overwrite these.
  template <int kCount>
  MATE_DEVICE static void settle(FragC (&c)[kCount]) {
    MATE_UNROLL
    for (int i = 0; i < kCount * 8; ++i) asm volatile("" : "+f"(c[i / 8].x[i % 8])::"memory");
  }
  template <int kCount>
  MATE_DEVICE static void settle(FragA (&a)[kCount]) {
    MATE_UNROLL
    for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(a[i / 4].x[i % 4])::"memory");
  }

  using Memory = OperandMemory;

  template <int kTiles>
  MATE_DEVICE static void columns(FragC (&c)[kTiles], const FragA (&a)[8], const uint16_t* operands,
                                  const Memory& memory) {
    const Place place = memory.at(operands, kRowsOf128);
    MATE_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int column = k * kBlock;
      const int offset = column / kPanel * kOperandRows * kPanel + column % kPanel;
      group_multiply<0>(c, k > 0, a[k], place.at(offset));
    }
  }

  static constexpr bool kWholeMatrices = true;
  template <int kMatrices, int kTiles>
  MATE_DEVICE static void lower(FragC (&c)[kTiles], const FragA (&a)[4], const uint16_t* tiles,
                                const Memory& memory) {
    static_assert(kTiles == 4 * kMatrices, "a sum for each matrix");
    const Place place = memory.at(tiles, kRowsOf32);
    MATE_UNROLL
    for (int k = 0; k < 4; ++k) {
      group_multiply<0>(c, k > 0, a[k], place.at(k * kTiles * kTileSize));
    }
  }

  struct Corrected {
    FragC c[8];  // by T's low terms, by its high ones
    MATE_DEVICE FragC tile(int t) const {
      FragC sum;
      MATE_UNROLL
      for (int v = 0; v < 8; ++v) sum.x[v] = c[t].x[v] + c[t + 4].x[v];
      return sum;
    }
  };
  MATE_DEVICE static void settle(Corrected& x) { settle(x.c); }

  template <class FormLow>
  MATE_DEVICE static void rows(FragC (&c)[8], const FragA (&high)[4], FragA (&low)[4],
                               const FormLow& form_low, const uint16_t* operands, int row,
                               const Memory& memory) {
    const Place place = memory.at(operands + row * kPanel, kRowsOf128, kOperandRows * kPanel * 2);
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) {
      group_multiply<1>(c, true, high[t], place.at(t * kBlock * kPanel));
    }
    form_low();  // while these are under way
    begin();
    MATE_UNROLL
    for (int t = 0; t < 4; ++t) {
      group_multiply<1>(c, true, low[t], place.at(t * kBlock * kPanel));
    }
  }
};

}  // namespace gpu
}  // namespace mate
