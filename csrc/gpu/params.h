// What the kernels are launched with: the caller's arguments, the workspace, and where a chunk's
// tokens lie.
//
// Chunks of 64 tokens are numbered over all sequences, one sequence after another. The operands
// that `prepare` makes of a chunk live in the workspace only until `scan` has read them: the host
// cuts the chunks into slabs and launches the kernels for each. What a slab holds of a sequence is
// walked as one segment, or cut into several that are walked side by side: see segments.h.
#pragma once

#include "arch/arch.h"
#include "mate/gpu.h"

#define MATE_EXPORT extern "C" __attribute__((visibility("default")))

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

// Division of numbers below 2^31 by one that the host knows.
struct Divisor {
  uint32_t by, factor;  // one more than 2^shift / by, rounded down
  int32_t shift;

  static Divisor of(int64_t by) {
    int32_t bits = 0;
    while (int64_t{1} << bits < by) ++bits;
    const int64_t whole = by > 0 ? (int64_t{1} << (31 + bits)) / by : 0;
    return {static_cast<uint32_t>(by), static_cast<uint32_t>(whole + 1), 31 + bits};
  }
  MATE_DEVICE uint32_t quotient(uint32_t x) const {
    return static_cast<uint32_t>(uint64_t{x} * factor >> shift);
  }
  MATE_DEVICE uint32_t rest(uint32_t x, uint32_t quotient) const { return x - quotient * by; }
};

// A chunk's tokens; none where it lies beyond the last sequence, num_seqs.
struct ChunkTokens {
  int64_t begin;
  int32_t count, sequence;
};

struct Params {
  mate_kda_args args;
  Operands* operands;                    // [chunk % ring][value head]
  uint32_t* reads;                       // alike: how often operands there were read
  int32_t ring;                          // chunks whose operands there is room for
  int32_t readers;                       // of a chunk's operands, in `scan`
  int64_t prepare_begin, prepare_end;    // chunks, of one launch
  int64_t *bounds, *first_chunk;         // [num_seqs + 1], with cu_seqlens: by plan.h
  ChunkTokens* chunk_tokens;             // [chunks], alike
  float *carry_in, *carry_out;           // [value head]: state of the sequence that a slab cuts
  int64_t chunks;                        // at most, over all sequences
  Divisor heads, rings;                  // value heads; `ring`
  Divisor group, length;                 // value heads to a query head; chunks of each sequence
  int64_t slab_begin, slab_end;          // chunks
  int64_t segment_chunks, slots;         // a segment's length; as many are kept in what follows
  float* ends;                           // [slot][value head]: states, as registers hold them
  uint16_t* maps;                        // [slot][value head][kMapSize]
  int32_t* alive;                        // [slot][value head]: the map is more than zeros
  bool contracts;                        // no map of a chunk grows a state: |k| <= 1, b <= 2
  bool q_aligned, k_aligned, v_aligned;  // every row starts at a multiple of 16 bytes
  bool g_aligned, output_aligned;
  bool initial_paired, final_paired;  // two neighbouring keys of a state lie side by side
};

MATE_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
MATE_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
MATE_DEVICE int element_size(int32_t dtype) { return dtype == MATE_FLOAT32 ? 4 : 2; }

// The row of 128 channels (or the one element of beta) at {batch, token, head}; for a state,
// {sequence, head, row}.
MATE_DEVICE int64_t offset_of(const mate_tensor& x, int64_t i, int64_t j, int64_t k) {
  return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}
MATE_DEVICE char* row_at(const mate_tensor& x, int64_t i, int64_t j, int64_t k) {
  return static_cast<char*>(x.data) + offset_of(x, i, j, k) * element_size(x.dtype);
}

// Whether operands are written in place of others.
MATE_DEVICE bool wraps(const Params& p) { return p.ring < p.chunks; }

// The place of a sequence's state in a pool: outside of it, -1.
MATE_DEVICE int64_t state_index(const void* indices, bool is_64bit, int64_t num_states, int64_t n) {
  if (!indices) return n;
  const int64_t i =
      is_64bit ? static_cast<const int64_t*>(indices)[n] : static_cast<const int32_t*>(indices)[n];
  return i >= 0 && i < num_states ? i : -1;
}

inline bool known_dtype(int32_t dtype) { return dtype >= MATE_FLOAT32 && dtype <= MATE_BFLOAT16; }

// Whether every row starts at a multiple of 16 bytes. A stride that is never taken may be anything.
inline bool rows_aligned(const mate_tensor& x, int64_t first, int64_t second, int64_t third) {
  const int64_t size = x.dtype == MATE_FLOAT32 ? 4 : 2, counts[] = {first, second, third};
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    aligned = aligned && (counts[i] <= 1 || x.stride[i] * size % 16 == 0);
  }
  return aligned;
}

// A bound of cu_seqlens: whatever that holds, inside [0, total_tokens].
template <class Args>
MATE_DEVICE int64_t clamped_bound(const Args& a, int64_t i) {
  const int64_t x = a.cu_seqlens_is_64bit ? static_cast<const int64_t*>(a.cu_seqlens)[i]
                                          : static_cast<const int32_t*>(a.cu_seqlens)[i];
  return x < 0 ? 0 : x < a.total_tokens ? x : a.total_tokens;
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
  if (!p.args.cu_seqlens) return p.length.quotient(static_cast<uint32_t>(chunk));
  return chunk < p.chunks ? p.chunk_tokens[chunk].sequence : p.args.num_seqs;
}

MATE_DEVICE ChunkTokens tokens_of(const Params& p, uint32_t chunk) {
  if (p.args.cu_seqlens) return p.chunk_tokens[chunk];
  const uint32_t n = p.length.quotient(chunk);
  const int64_t begin = int64_t{p.length.rest(chunk, n)} * kChunk, left = p.args.seq_len - begin;
  return {begin, static_cast<int32_t>(left < kChunk ? left : kChunk), static_cast<int32_t>(n)};
}

// A segment of what the slab holds of a sequence, which is cut where that pays: into three or more,
// all but the last of full length. These, the inner ones, have slots for what becomes of the state
// in them, numbered by where they begin: two segments never begin within the same segment_chunks.
struct Segment {
  Sequence sequence;
  int64_t part;        // where the sequence begins in the slab
  int64_t begin, end;  // chunks

  MATE_DEVICE bool is_first() const { return begin == part; }
  MATE_DEVICE int64_t slot(const Params& p) const {
    return (begin - p.slab_begin) / p.segment_chunks;
  }
  MATE_DEVICE bool is_cut(const Params& p) const { return end - begin > 2 * p.segment_chunks; }
};

MATE_DEVICE Segment whole_part(const Params& p, int64_t n) {
  const Sequence x = sequence_at(p, n);
  const int64_t begin = larger(x.first_chunk, p.slab_begin);
  return {x, begin, begin, x.end_chunk < p.slab_end ? x.end_chunk : p.slab_end};
}

// May be of no chunks.
MATE_DEVICE Segment last_segment(const Params& p, int64_t n) {
  Segment s = whole_part(p, n);
  if (s.is_cut(p)) s.begin += (s.end - s.begin - 1) / p.segment_chunks * p.segment_chunks;
  return s;
}

// False if the slot is not used. A segment that begins in a slot's chunks reaches to the last of
// them, at least.
MATE_DEVICE bool inner_segment(const Params& p, int64_t slot, Segment& s) {
  const int64_t first = p.slab_begin + slot * p.segment_chunks;
  const int64_t chunk = first + p.segment_chunks - 1;
  const int64_t n = sequence_of(p, chunk);
  if (n >= p.args.num_seqs) return false;
  s = whole_part(p, n);
  if (!s.is_cut(p)) return false;
  const int64_t end = s.end;
  s.begin += (chunk - s.begin) / p.segment_chunks * p.segment_chunks;
  s.end = s.begin + p.segment_chunks;
  return s.begin >= first && s.end < end;
}

}  // namespace gpu
}  // namespace mate
