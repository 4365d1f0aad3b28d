// Where each sequence's tokens and chunks lie, from cu_seqlens on the device.
#pragma once

#include "params.h"

namespace mate {
namespace gpu {

constexpr int kPlanThreads = 256;
constexpr int kPlanShared = kPlanThreads * sizeof(int64_t);

// What the threads before this one have, combined; of the first 0.
template <class Combine>
MATE_DEVICE int64_t combine_before(int64_t mine, const Combine& combine) {
  int64_t* const values = reinterpret_cast<int64_t*>(shared_memory());
  const int i = thread_index();
  values[i] = mine;
  MATE_BARRIER();
  for (int step = 1; step < kPlanThreads; step *= 2) {
    const int64_t before = i < step ? 0 : values[i - step];
    MATE_BARRIER();
    values[i] = combine(before, values[i]);
    MATE_BARRIER();
  }
  return i == 0 ? 0 : values[i - 1];
}

// The number of the sequence that a chunk belongs to; num_seqs if it lies beyond the last.
MATE_DEVICE int64_t find_sequence(const Params& p, int64_t chunk) {
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

// One block; each thread takes a run of neighbouring sequences. Whatever cu_seqlens holds, bounds
// come out inside [0, total_tokens] and never decrease.
MATE_KERNEL(kPlanThreads, 1) plan(const Params p) {
  const int64_t n = p.args.num_seqs + 1, share = divide_up(n, kPlanThreads);
  const int64_t begin = thread_index() * share, end = begin + share < n ? begin + share : n;

  int64_t last = 0;
  for (int64_t i = begin; i < end; ++i) last = larger(last, clamped_bound(p.args, i));
  last = combine_before(last, [](int64_t a, int64_t b) { return larger(a, b); });
  for (int64_t i = begin; i < end; ++i) {
    last = larger(last, clamped_bound(p.args, i));
    p.bounds[i] = last;
  }
  MATE_BARRIER();  // bounds are read by neighbours

  int64_t chunks = 0;
  for (int64_t i = begin; i < end && i + 1 < n; ++i) {
    chunks += divide_up(p.bounds[i + 1] - p.bounds[i], kChunk);
  }
  chunks = combine_before(chunks, [](int64_t a, int64_t b) { return a + b; });
  for (int64_t i = begin; i < end; ++i) {
    p.first_chunk[i] = chunks;
    if (i + 1 < n) chunks += divide_up(p.bounds[i + 1] - p.bounds[i], kChunk);
  }
  MATE_BARRIER();
  for (int64_t chunk = thread_index(); chunk < p.chunks; chunk += kPlanThreads) {
    const int64_t i = find_sequence(p, chunk);
    ChunkTokens x = {0, 0, static_cast<int32_t>(i)};
    if (i < p.args.num_seqs) {
      x.begin = p.bounds[i] + (chunk - p.first_chunk[i]) * kChunk;
      const int64_t left = p.bounds[i + 1] - x.begin;
      x.count = static_cast<int32_t>(left < kChunk ? left : kChunk);
    }
    p.chunk_tokens[chunk] = x;
  }
}

}  // namespace gpu
}  // namespace mate
