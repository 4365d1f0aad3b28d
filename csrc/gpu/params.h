// What the kernels are launched with: the caller's arguments, the workspace, and where a chunk's
// tokens lie.
//
// Chunks of 64 tokens are numbered over all sequences, one sequence after another. The operands
// that `prepare` makes of a chunk live in the workspace only until `scan` has read them: the host
// cuts the chunks into slabs and launches both kernels for each.
#pragma once

#include "arch/arch.h"
#include "mate/gpu.h"

namespace mate {
namespace gpu {

constexpr int kDim = MATE_HEAD_DIM;
constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16;  // a side of the products' tiles
constexpr int kTokenTiles = kChunk / kBlock, kKeyTiles = kDim / kBlock;

// Of a matrix [tokens, tokens] with zeros above its diagonal the tiles on and below that are kept,
// the lower ones, column by column: Tile<kBlock>.
constexpr int kTileSize = kBlock * kBlock;
constexpr int kLowerTiles = kTokenTiles * (kTokenTiles + 1) / 2;
constexpr int kLowerSize = kLowerTiles * kTileSize;
MATE_DEVICE constexpr int lower_tile(int row, int column) {
  return column * (2 * kTokenTiles + 1 - column) / 2 + row - column;
}

constexpr int kOperandRows = 3 * kChunk;

// Of one chunk and head, as `scan` wants it in shared memory; see prepare.h for what it holds.
struct alignas(16) Operands {
  uint16_t rows[kOperandRows * kDim];  // k_in, q_in, k_out one below another
  uint16_t T_low[kLowerSize], T_high[kLowerSize], P[kLowerSize];
  float decay[kDim];
};

struct Params {
  mate_kda_args args;
  Operands* operands;                    // [slab's chunk][value head]
  int64_t *bounds, *first_chunk;         // [num_seqs + 1], with cu_seqlens: by plan.h
  float *carry_in, *carry_out;           // [value head][V][K]: of the sequence that a slab cuts
  int64_t slab_begin, slab_end;          // chunks
  bool q_aligned, k_aligned, v_aligned;  // every row starts at a multiple of 16 bytes
  bool g_aligned, output_aligned;
};

MATE_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
MATE_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
MATE_DEVICE int element_size(int32_t dtype) { return dtype == MATE_FLOAT32 ? 4 : 2; }

// The row of 128 channels (or the one element of beta) at {batch, token, head}; for a state,
// {sequence, head, row}.
MATE_DEVICE char* row_at(const mate_tensor& x, int64_t i, int64_t j, int64_t k) {
  const int64_t offset = i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  return static_cast<char*>(x.data) + offset * element_size(x.dtype);
}

struct Sequence {
  int64_t index, batch, begin, end;  // tokens
  int64_t first_chunk, end_chunk;
};

MATE_DEVICE Sequence sequence_at(const Params& p, int64_t n) {
  if (p.args.cu_seqlens) {
    return {n, 0, p.bounds[n], p.bounds[n + 1], p.first_chunk[n], p.first_chunk[n + 1]};
  }
  const int64_t chunks = divide_up(p.args.seq_len, kChunk);
  return {n, n, 0, p.args.seq_len, n * chunks, (n + 1) * chunks};
}

// The number of the sequence that a chunk belongs to; num_seqs if it lies beyond the last.
MATE_DEVICE int64_t sequence_of(const Params& p, int64_t chunk) {
  if (!p.args.cu_seqlens) return chunk / divide_up(p.args.seq_len, kChunk);
  int64_t low = 0, high = p.args.num_seqs + 1;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (p.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace gpu
}  // namespace mate
