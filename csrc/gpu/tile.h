// Matrices of 16-bit numbers in shared memory, and elements of the caller's tensors.
#pragma once

#include "params.h"

namespace mate {
namespace gpu {

// Rows of kColumns numbers. Pieces of 8 are permuted within a row, so that the same
// piece of 8 neighbouring rows, which is what a product's operand is loaded from, lies in different
// banks.
template <int kColumns>
struct Tile {
  static constexpr int kPieces = kColumns / 8;
  uint16_t* data;

  MATE_DEVICE explicit Tile(const uint16_t* data) : data(const_cast<uint16_t*>(data)) {}

  MATE_DEVICE static unsigned place(unsigned row, unsigned column) {
    const unsigned turn = kPieces >= 8 ? row % 8 : row / (8 / kPieces) % kPieces;
    return row * kColumns + (column ^ turn * 8);
  }
  MATE_DEVICE uint16_t* at(unsigned row, unsigned column) const {
    return data + place(row, column);
  }

  // The same as at(row + r, column + c) for r, c < 16 and multiples of 16 in row and column: what
  // depends on the lane stands apart from what depends on the block, which is mostly known to the
  // compiler.
  MATE_DEVICE uint16_t* in_block(unsigned row, unsigned column, unsigned r, unsigned c) const {
    return data + ((place(r, c) ^ column) + row * kColumns);
  }
};

// Wider matrices of kRows rows, in panels of kPanel columns: rows of 128 bytes, which the products
// of a warp group read as they are.
constexpr int kPanel = 64;
template <int kRows>
struct Panels {
  uint16_t* data;

  MATE_DEVICE explicit Panels(const uint16_t* data) : data(const_cast<uint16_t*>(data)) {}

  MATE_DEVICE Tile<kPanel> panel(unsigned column) const {
    return Tile<kPanel>{data + column / kPanel * kRows * kPanel};
  }
  MATE_DEVICE uint16_t* at(unsigned row, unsigned column) const {
    return panel(column).at(row, column % kPanel);
  }
  MATE_DEVICE uint16_t* in_block(unsigned row, unsigned column, unsigned r, unsigned c) const {
    return panel(column).in_block(row, column % kPanel, r, c);
  }
};

using OperandRows = Panels<kOperandRows>;

// Where a column lies in four rows at a time of a Tile<kColumns>, from the first row on.
template <int kColumns>
struct FourRows {
  unsigned bytes[4];
  unsigned turn;  // of pieces, from rows 8 i + r to rows 8 i + 4 + r; back from there to the next

  MATE_DEVICE explicit FourRows(unsigned column) : turn(column & 32 ? -64u : 64u) {
    static_assert(Tile<kColumns>::kPieces >= 8, "rows take eight turns");
    MATE_UNROLL
    for (unsigned r = 0; r < 4; ++r) bytes[r] = Tile<kColumns>::place(r, column) * 2;
  }
  MATE_DEVICE uint16_t* at(const uint16_t* tile, int r) const {
    char* from = const_cast<char*>(reinterpret_cast<const char*>(tile));
    return reinterpret_cast<uint16_t*>(from + bytes[r]);
  }
  MATE_DEVICE void advance() {
    MATE_UNROLL
    for (unsigned& place : bytes) place += 4 * kColumns * 2 + turn;
    turn = -turn;
  }
};

struct alignas(16) Eight {
  uint32_t x[4];  // 16-bit numbers, two in each
};
struct alignas(8) Pair {
  float x, y;
};

template <int32_t kDtype>
MATE_DEVICE float from_16_bits(uint32_t bits) {
  if (kDtype == MATE_FLOAT16) return from_fp16(static_cast<uint16_t>(bits));
  return from_bits(bits << 16);
}
template <int32_t kDtype>
MATE_DEVICE uint32_t pack(float low, float high) {
  if (kDtype == MATE_BFLOAT16) return pack_bf16(low, high);
  return pack_fp16(low, high);
}
template <int32_t kDtype>
MATE_DEVICE Pair unpack(uint32_t both) {
  return {from_16_bits<kDtype>(both & 0xffffu), from_16_bits<kDtype>(both >> 16)};
}

// An element in two steps, for what is asked for long before it is used.
MATE_DEVICE uint32_t load_bits(const void* p, int64_t index, int32_t dtype) {
  if (dtype == MATE_FLOAT32) return static_cast<const uint32_t*>(p)[index];
  return static_cast<const uint16_t*>(p)[index];
}
MATE_DEVICE float to_float(uint32_t bits, int32_t dtype) {
  if (dtype == MATE_FLOAT32) return from_bits(bits);
  return dtype == MATE_FLOAT16 ? from_16_bits<MATE_FLOAT16>(bits)
                               : from_16_bits<MATE_BFLOAT16>(bits);
}
MATE_DEVICE float load_element(const void* p, int64_t index, int32_t dtype) {
  return to_float(load_bits(p, index, dtype), dtype);
}
MATE_DEVICE void store_element(void* p, int64_t index, int32_t dtype, float x) {
  if (dtype == MATE_FLOAT32) {
    static_cast<float*>(p)[index] = x;
  } else {
    static_cast<uint16_t*>(p)[index] = dtype == MATE_FLOAT16 ? to_fp16(x) : to_bf16(x);
  }
}

// An accumulator in two terms, elements 2 i and 2 i + 1 together.
struct Split {
  uint32_t high[4], low[4];
};
MATE_DEVICE void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - from_bits(high << 16), y - from_bits(high & 0xffff0000u));
}
MATE_DEVICE Split split(const FragC& c) {
  Split s;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) split_pair(c.x[2 * i], c.x[2 * i + 1], s.high[i], s.low[i]);
  return s;
}

// What one term leaves out.
MATE_DEVICE FragC rest_of(const FragC& c) {
  FragC rest;
  MATE_UNROLL
  for (int v = 0; v < 8; v += 2) {
    const uint32_t high = pack_bf16(c.x[v], c.x[v + 1]);
    rest.x[v] = c.x[v] - from_bits(high << 16);
    rest.x[v + 1] = c.x[v + 1] - from_bits(high & 0xffff0000u);
  }
  return rest;
}

// An accumulator in one term.
struct Rounded {
  uint32_t both[4];
};
MATE_DEVICE Rounded rounded(const FragC& c) {
  Rounded x;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) x.both[i] = pack_bf16(c.x[2 * i], c.x[2 * i + 1]);
  return x;
}

// x in two terms.
MATE_DEVICE void store_split(uint16_t* high, uint16_t* low, float x) {
  *high = to_bf16(x);
  *low = to_bf16(x - from_bits(uint32_t{*high} << 16));
}

// Four neighbouring channels.
struct alignas(16) Four {
  float x[4];
};
struct alignas(8) PackedFour {
  uint32_t x[2];
};

MATE_DEVICE Four load_four(const float* p) { return *reinterpret_cast<const Four*>(p); }
MATE_DEVICE void store_four(float* p, const Four& x) { *reinterpret_cast<Four*>(p) = x; }

template <int32_t kDtype>
MATE_DEVICE Four unpack_four(const PackedFour& packed) {
  const Pair a = unpack<kDtype>(packed.x[0]), b = unpack<kDtype>(packed.x[1]);
  return {{a.x, a.y, b.x, b.y}};
}
MATE_DEVICE PackedFour load_packed(const uint16_t* p) {
  return *reinterpret_cast<const PackedFour*>(p);
}
template <int32_t kDtype>
MATE_DEVICE Four unpack_four(const uint16_t* p) {
  return unpack_four<kDtype>(load_packed(p));
}
template <int32_t kDtype>
MATE_DEVICE PackedFour pack_four(const Four& x) {
  return {{pack<kDtype>(x.x[0], x.x[1]), pack<kDtype>(x.x[2], x.x[3])}};
}
MATE_DEVICE void store_four(uint16_t* p, const PackedFour& x) {
  *reinterpret_cast<PackedFour*>(p) = x;
}
// bf16
MATE_DEVICE PackedFour operator*(const PackedFour& a, const PackedFour& b) {
  return {{multiply_bf16(a.x[0], b.x[0]), multiply_bf16(a.x[1], b.x[1])}};
}

MATE_DEVICE Four operator*(const Four& a, const Four& b) {
  return {{a.x[0] * b.x[0], a.x[1] * b.x[1], a.x[2] * b.x[2], a.x[3] * b.x[3]}};
}
MATE_DEVICE Four operator*(const Four& a, float b) {
  return {{a.x[0] * b, a.x[1] * b, a.x[2] * b, a.x[3] * b}};
}
MATE_DEVICE Four operator+(const Four& a, const Four& b) {
  return {{a.x[0] + b.x[0], a.x[1] + b.x[1], a.x[2] + b.x[2], a.x[3] + b.x[3]}};
}
MATE_DEVICE Four operator-(const Four& a, const Four& b) {
  return {{a.x[0] - b.x[0], a.x[1] - b.x[1], a.x[2] - b.x[2], a.x[3] - b.x[3]}};
}
MATE_DEVICE Four operator-(const Four& a) { return {{-a.x[0], -a.x[1], -a.x[2], -a.x[3]}}; }
MATE_DEVICE Four fast_exp2(const Four& a) {
  return {{fast_exp2(a.x[0]), fast_exp2(a.x[1]), fast_exp2(a.x[2]), fast_exp2(a.x[3])}};
}

MATE_DEVICE Eight load_eight(const void* row, int column, bool aligned) {
  const uint16_t* p = static_cast<const uint16_t*>(row) + column;
  if (aligned) return *reinterpret_cast<const Eight*>(p);
  Eight out;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) out.x[i] = p[2 * i] | static_cast<uint32_t>(p[2 * i + 1]) << 16;
  return out;
}
MATE_DEVICE void store_eight(void* row, int column, bool aligned, const Eight& x) {
  uint16_t* p = static_cast<uint16_t*>(row) + column;
  if (aligned) {
    *reinterpret_cast<Eight*>(p) = x;
    return;
  }
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    p[2 * i] = static_cast<uint16_t>(x.x[i]);
    p[2 * i + 1] = static_cast<uint16_t>(x.x[i] >> 16);
  }
}

}  // namespace gpu
}  // namespace mate
