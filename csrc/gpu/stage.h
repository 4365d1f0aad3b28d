// What a block of `scan` holds of a chunk, who copies it there, and how.
#pragma once

#include <type_traits>

#include "products.h"

namespace mate {
namespace gpu {

// Operands in shared memory: of T and P with room for the tiles above the diagonal, and the terms
// of T side by side.
struct StageOperands {
  uint16_t rows[kOperandRows * kDim];
  uint16_t T[kTokenTiles][2][kTokenTiles * kTileSize];  // {tile column, term}: low, high
  uint16_t P[kTokenTiles][kTokenTiles * kTileSize];
  float decay[kDim];
};

// What a block holds of one chunk.
template <int kSlice>
struct alignas(1024) Stage {
  StageOperands operands;
  uint16_t values[kChunk * kSlice];
};

template <int kSlice, int kStages>
struct ScanShared {
  Stage<kSlice> stage[kStages];
  Arrival arrival[kStages];
  float weight[2][kSlice / kBlock];  // of a warp's part of a map, after this chunk and the last
  uint16_t scratch[kSlice / kBlock * kScratch + 8];
  Arrival read[kStages];  // of owners that are done with a stage
};

// The warps of a block. Narrow slices have few, whose time decides; others copy for them, and so do
// producers for slices of any width.
template <int kSlice>
struct Crew {
  static constexpr int kOwners = kSlice / kBlock;  // warps that own 16 value channels each
  static constexpr bool kGroups = kOwners % 4 == 0;
  using Products = std::conditional_t<kGroups, GroupProducts, WarpProducts>;
  static constexpr bool kProducer = kGroups && kProducers;
  static constexpr int kCopiers = kSlice == 128 && !kProducer ? 256 : 128;  // threads
  static constexpr int kFirstCopier = kCopiers == 256 ? 0 : kOwners * 32;
  static constexpr int kThreads = kFirstCopier + kCopiers;

  // The host is not compiled for one architecture: with those of the device at hand.
  static constexpr int threads(bool producers) {
    return producers && kGroups ? kOwners * 32 + 128 : kThreads;
  }

  // Each role has its registers: 3 x 168 are all there are. Producers of maps look around first.
  template <bool kOutput>
  MATE_DEVICE static void begin_producer() {
    if (kSlice == 128) leave_registers<kOutput ? 40 : 72>();
  }
  template <bool kOutput>
  MATE_DEVICE static void begin_owner() {
    if (kSlice == 128) take_registers<kOutput ? 232 : 216>();
  }
};

// ---- copies -------------------------------------------------------------------------------------

template <int kStep, int kCount, int kIndex = 0>
MATE_DEVICE void copy_every(void* to, const void* from) {
  if constexpr (kIndex < kCount) {
    copy_async_at<kIndex * kStep>(to, from);
    copy_every<kStep, kCount, kIndex + 1>(to, from);
  }
}

// Lower tiles to their places among all; `column`: elements from one tile column to the next.
template <int kThreads>
MATE_DEVICE void copy_lower(uint16_t* to, int column, const uint16_t* from, int copier) {
  MATE_UNROLL
  for (int first = 0; first < kLowerSize / 8; first += kThreads) {
    const int i = first + copier, tile = i / (kTileSize / 8);
    if (i >= kLowerSize / 8) return;
    int j = 0;
    MATE_UNROLL
    for (int next = 1; next < kTokenTiles; ++next) j += tile >= lower_tile(next, next);
    const int row = tile - lower_tile(j, j) + j;
    copy_async(to + j * column + row * kTileSize + i % (kTileSize / 8) * 8, from + i * 8);
  }
}

// Without output, q_in and P are not needed.
template <int kThreads, bool kOutput>
MATE_DEVICE void copy_operands(StageOperands& to, const Operands& from, int copier) {
  char* target = reinterpret_cast<char*>(&to) + copier * 16;
  const char* source = reinterpret_cast<const char*>(&from) + copier * 16;
  if (kOutput) {
    copy_every<kThreads * 16, sizeof(from.rows) / 16 / kThreads>(target, source);
    copy_lower<kThreads>(to.P[0], sizeof(to.P[0]) / 2, from.P, copier);
  } else {
    constexpr int kPart = kChunk * kPanel * 2;  // bytes of k_in, q_in or k_out in a panel
    MATE_UNROLL
    for (int part = 0; part < 2 * 3; ++part) {
      if (part % 3 == 1) continue;
      copy_every<kThreads * 16, kPart / 16 / kThreads>(target + part * kPart,
                                                       source + part * kPart);
    }
  }
  copy_lower<kThreads>(to.T[0][0], sizeof(to.T[0]) / 2, from.T_low, copier);
  copy_lower<kThreads>(to.T[0][1], sizeof(to.T[0]) / 2, from.T_high, copier);
  if (copier < kDim / 4) copy_async(to.decay + copier * 4, from.decay + copier * 4);
}

// The same in bulk: announced, and all but the matrices,
template <bool kOutput>
MATE_DEVICE void copy_rows_bulk(StageOperands& to, const Operands& from, Arrival& arrival) {
  constexpr int kPart = kChunk * kPanel;
  expect_bytes(arrival,
               kOutput ? sizeof(Operands) : sizeof(Operands) - sizeof(from.P) - 2 * kPart * 2);
  if (kOutput) {
    copy_bulk(to.rows, from.rows, sizeof(from.rows), arrival);
  } else {
    MATE_UNROLL
    for (int part = 0; part < 2 * 3; ++part) {
      if (part % 3 == 1) continue;
      copy_bulk(to.rows + part * kPart, from.rows + part * kPart, kPart * 2, arrival);
    }
  }
  copy_bulk(to.decay, from.decay, sizeof(from.decay), arrival);
}

// and a matrix; `column`: elements from one tile column to the next.
MATE_DEVICE void copy_lower_bulk(uint16_t* to, int column, const uint16_t* from, Arrival& arrival) {
  MATE_UNROLL
  for (int j = 0; j < kTokenTiles; ++j) {
    copy_bulk(to + j * (column + kTileSize), from + lower_tile(j, j) * kTileSize,
              (kTokenTiles - j) * kTileSize * 2, arrival);
  }
}

// All of it by one thread.
template <bool kOutput>
MATE_DEVICE void copy_operands(StageOperands& to, const Operands& from, Arrival& arrival) {
  copy_rows_bulk<kOutput>(to, from, arrival);
  copy_lower_bulk(to.T[0][0], sizeof(to.T[0]) / 2, from.T_low, arrival);
  copy_lower_bulk(to.T[0][1], sizeof(to.T[0]) / 2, from.T_high, arrival);
  if (kOutput) copy_lower_bulk(to.P[0], sizeof(to.P[0]) / 2, from.P, arrival);
}

// By one lane of each of four warps, which takes several hundred cycles off.
template <bool kOutput>
MATE_DEVICE void produce_operands(StageOperands& to, const Operands& from, Arrival& arrival,
                                  int warp) {
  if (warp == 0) {
    copy_rows_bulk<kOutput>(to, from, arrival);
  } else if (kOutput || warp < 3) {
    const bool P = warp == 3;
    copy_lower_bulk(P ? to.P[0] : to.T[0][warp - 1], P ? sizeof(to.P[0]) / 2 : sizeof(to.T[0]) / 2,
                    P           ? from.P
                    : warp == 1 ? from.T_low
                                : from.T_high,
                    arrival);
  }
}

// The tiles above the diagonal, which are never copied.
template <int kThreads>
MATE_DEVICE void clear_upper(StageOperands& to) {
  for (int i = thread_index(); i < kTokenTiles * kTileSize / 8; i += kThreads) {
    const int row = i / (kTileSize / 8);
    MATE_UNROLL
    for (int j = 1; j < kTokenTiles; ++j) {
      if (row >= j) continue;
      reinterpret_cast<Eight*>(to.T[j][0])[i] = Eight{};
      reinterpret_cast<Eight*>(to.T[j][1])[i] = Eight{};
      reinterpret_cast<Eight*>(to.P[j])[i] = Eight{};
    }
  }
}

// The slice's columns of v from the first token on; absent ones are zeros.
template <int kSlice, int kThreads>
MATE_DEVICE void copy_values(const Params& p, const uint16_t* first, int tokens, uint16_t* values,
                             int copier) {
  constexpr int kPieces = kSlice / 8, kRows = kThreads / kPieces;
  const int token = copier / kPieces, column = copier % kPieces * 8;
  const uint16_t* v = first + token * p.args.v.stride[1] + column;
  const auto each_row = [&](const auto& copy) {
    MATE_UNROLL
    for (int i = 0; i < kChunk; i += kRows, v += kRows * p.args.v.stride[1]) {
      copy(Tile<kSlice>{values}.at(i + token, column), i + token < tokens);
    }
  };
  if (p.v_aligned) {
    each_row([&](uint16_t* to, bool present) { copy_async(to, v, present); });
  } else {
    each_row([&](uint16_t* to, bool present) {
      *reinterpret_cast<Eight*>(to) = present ? load_eight(v, 0, false) : Eight{};
    });
  }
}

}  // namespace gpu
}  // namespace mate
