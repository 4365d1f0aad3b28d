// How a call is cut into slabs and segments, and where everything lies in the workspace.
#pragma once

#include "segments.h"

namespace mate {
namespace gpu {

// Of workspace, as long as a chunk of all heads fits.
#if !defined(MATE_GPU_MOST_BYTES)
#define MATE_GPU_MOST_BYTES (256 << 20)
#endif
constexpr int64_t kMostBytes = MATE_GPU_MOST_BYTES;

inline int64_t count_of(int64_t all, int64_t each) { return (all + each - 1) / each; }
inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Segments side by side (segments.h), where blocks are few. Costs are in times of a chunk: what a
// walk begins with, a step of join_segments, the launches on top.
constexpr int64_t kMostSlots = 160;  // of all heads: 20 MiB
constexpr int64_t kLeastFree = 6;    // multiprocessors a sequence and head
constexpr double kStartCost = 8, kJoinCost = 0.7, kLaunchCost = 6;

// Of a walk over `chunks` in so many pieces, by `rows` sequences and heads at a time on `room`
// multiprocessors.
inline double walk_cost(int64_t chunks, int64_t pieces, int64_t rows, int64_t room) {
  const auto waves = [&](int64_t blocks) { return static_cast<double>(count_of(blocks, room)); };
  const double length = static_cast<double>(count_of(chunks, pieces)) + kStartCost;
  if (pieces == 1) return waves(rows) * length;
  return (waves(rows * (2 * pieces - 3)) + waves(rows * pieces)) * length +
         static_cast<double>(pieces) * kJoinCost + kLaunchCost;
}

// How many chunks a segment has. A slab's walks last as long as its longest sequence; in a varlen
// call that may be all of it. If it is not, no more is lost than two launches whose blocks return.
inline int64_t choose_segment(const mate_kda_args& args, int64_t slab_chunks) {
#if defined(MATE_GPU_SEGMENT_CHUNKS)
  (void)args, (void)slab_chunks;
  return MATE_GPU_SEGMENT_CHUNKS;
#else
  const int64_t whole = args.cu_seqlens ? slab_chunks : count_of(args.seq_len, kChunk);
  const int64_t longest = whole < slab_chunks ? whole : slab_chunks;
  if (longest <= 0 || args.heads_v <= 0) return 1;
  const int64_t rows = count_of(slab_chunks, longest) * args.heads_v, room = multiprocessors();
  // Where that much of the GPU is free, the next slab is better prepared there.
  if (kLeastFree * rows > room) return slab_chunks;
  int64_t best = 1;
  double least = walk_cost(longest, 1, rows, room);
  for (int64_t n = 3; n <= longest && n * rows <= kMostSlots; ++n) {
    const double cost = walk_cost(longest, n, rows, room);
    if (cost >= least) continue;
    best = n;
    least = cost;
  }
  return best == 1 ? slab_chunks : count_of(longest, best);
#endif
}

// Where a scan leaves at least half of the GPU to what prepares the next slab: so many chunks a
// slab and more are worth the walks' beginning, in so many slabs.
#if !defined(MATE_GPU_LEAST_SLAB)
#define MATE_GPU_LEAST_SLAB 32
#endif
constexpr int64_t kLeastSlab = MATE_GPU_LEAST_SLAB, kWorthwhileSlabs = 3, kMostSlabs = 4;

// How the chunks are cut, and where everything lies in the workspace.
struct Layout {
  int64_t chunks;       // at most, over all sequences
  int64_t slabs;        // at least one: empty sequences keep their states
  int64_t slab_chunks;  // of all but the last
  int64_t segment_chunks, slots;
  int64_t ring;  // chunks that there is room for, a slab or more
  int64_t first_chunk, chunk_tokens, carry, ends, maps, alive, operands, reads, bytes;

  explicit Layout(const mate_kda_args& args) {
    chunks = args.cu_seqlens ? args.total_tokens / kChunk + args.num_seqs
                             : args.num_seqs * count_of(args.seq_len, kChunk);
    if (args.cu_seqlens && args.total_tokens == 0) chunks = 0;
    int64_t wanted = larger_of(1, count_of(chunks * chunk_bytes(args), kMostBytes));
    do {  // slabs that are all about alike
      slab_chunks = count_of(chunks, wanted++);
      place(args);
    } while (slab_chunks > 1 && ring < slab_chunks);
    if (slots == 0 && !divide(args) && slabs > 1) widen(args);
    if (ring < slab_chunks) ring = slab_chunks;
    reads = operands + ring * args.heads_v * static_cast<int64_t>(sizeof(Operands));
    bytes = operands + ring * chunk_bytes(args);
  }

  static int64_t state_elements(const mate_kda_args& args) { return args.heads_v * kDim * kDim; }

  // Whether a scan by 64 value channels leaves at least half of the GPU free.
  static bool is_roomy(const mate_kda_args& args) {
    return overlaps() && 4 * args.num_seqs * args.heads_v <= multiprocessors();
  }

  int64_t slab_end(int64_t slab) const {
    const int64_t end = (slab + 1) * slab_chunks;
    return end < chunks ? end : chunks;
  }

 private:
  // A few slabs, each of which is prepared in less than the time in which the one before it is
  // scanned: where that is narrow, on what it leaves of the GPU.
  bool divide(const mate_kda_args& args) {
    const int64_t alike = slab_chunks, most = chunks / kLeastSlab;
    if (!is_roomy(args) || most < 2) return false;
    for (int64_t n = most < kWorthwhileSlabs ? most : kWorthwhileSlabs; n <= kMostSlabs; ++n) {
      slab_chunks = count_of(chunks, n);
      place(args);
      if (ring >= slab_chunks && slots == 0) return true;
    }
    slab_chunks = alike;
    place(args);
    return false;
  }

  // Slabs as large as there is room for, rather than alike: what each costs is its walks'
  // beginning.
  void widen(const mate_kda_args& args) {
    const int64_t alike = slab_chunks;
    slab_chunks = larger_of(ring, 1);
    place(args);
    if (slots == 0 && ring >= slab_chunks) return;
    slab_chunks = alike;
    place(args);
  }

  // Operands and their counts.
  static int64_t chunk_bytes(const mate_kda_args& args) {
    return args.heads_v * static_cast<int64_t>(sizeof(Operands) + sizeof(uint32_t));
  }

  void place(const mate_kda_args& args) {
    const auto aligned = [](int64_t x) { return (x + 255) / 256 * 256; };
    const int64_t table =
        aligned(args.cu_seqlens ? (args.num_seqs + 1) * static_cast<int64_t>(sizeof(int64_t)) : 0);
    slabs = slab_chunks ? count_of(chunks, slab_chunks) : 1;
    segment_chunks = choose_segment(args, slab_chunks);
    slots = 2 * segment_chunks < slab_chunks ? (slab_chunks - 1) / segment_chunks : 0;
    first_chunk = table;
    chunk_tokens = 2 * table;
    const int64_t tokens = args.cu_seqlens ? chunks * static_cast<int64_t>(sizeof(ChunkTokens)) : 0;
    carry = chunk_tokens + aligned(tokens);
    ends = carry + (slabs > 1 ? 2 * state_elements(args) * 4 : 0);
    maps = ends + slots * state_elements(args) * 4;
    alive = maps + slots * args.heads_v * kMapSize * 2;
    operands = alive + aligned(slots * args.heads_v * 4);
    const int64_t left = kMostBytes - operands;
    ring = left > 0 && args.heads_v > 0 ? left / chunk_bytes(args) : 0;
    if (ring > chunks) ring = chunks;
  }
};

}  // namespace gpu
}  // namespace mate
