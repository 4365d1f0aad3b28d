// What a machine makes of the names of arch.h, in numbers that come out exactly if it keeps what
// they promise. For `python -m mate selftest`, which knows what to expect.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

struct ProbeParams {
  const uint16_t *A, *B;  // [16, 16], bf16
  float* results;         // [kProbes][16][16]
};

struct ProbeShared {
  uint16_t A[kTileSize], B[kTileSize], kept[kTileSize];
  uint16_t scratch[kScratch + 8];
};

// The order of results.
enum Probe {
  kProductRows,     // A B, B read by rows
  kProductColumns,  // A B^T: B read by columns
  kAccumulated,     // A^T + A B, A^T as an accumulator
  kOperand,         // bf16(A B) B: an accumulator become an operand
  kKeptRows,        // bf16(A B), through shared memory
  kKeptColumns,     // its transpose
  kShuffled,        // [8 masks][32 lanes]: the number of the lane that it came from
  kNumbers,         // [8 functions][32 lanes] of lane - 15.63, or of its magnitude
  kProbes
};
MATE_DEVICE int probe_mask(int i) { return i < 5 ? 1 << i : i == 5 ? 3 : i == 6 ? 21 : 31; }

MATE_DEVICE FragC widened(const uint32_t (&both)[4]) {
  FragC c;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    c.x[2 * i] = from_bits(both[i] << 16);
    c.x[2 * i + 1] = from_bits(both[i] & 0xffff0000u);
  }
  return c;
}
MATE_DEVICE void store_probe(const ProbeParams& p, int probe, const FragC& c) {
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    p.results[probe * kTileSize + row_of(v) * kBlock + column_of(v)] = c.x[v];
  }
}
// The tile as it lies in shared memory.
MATE_DEVICE void store_kept(const ProbeParams& p, int probe, const Tile<kBlock>& kept) {
  MATE_WARP_BARRIER();
  for (int i = lane_index(); i < kTileSize; i += 32) {
    p.results[probe * kTileSize + i] = from_bits(uint32_t{*kept.at(i / kBlock, i % kBlock)} << 16);
  }
  MATE_WARP_BARRIER();
}

MATE_DEVICE void probe_numbers(float* to) {
  const int lane = lane_index();
  const float x = static_cast<float>(lane) - 15.63f, size = fabsf(x);
  const float values[8] = {fast_exp2(x),
                           fast_log2(size),
                           fast_reciprocal(x),
                           fast_rsqrt(size),
                           from_fp16(to_fp16(x)),
                           from_bits(uint32_t{to_bf16(x)} << 16),
                           from_bits(pack_bf16(x, -x) << 16),
                           from_bits(pack_bf16(x, -x) & 0xffff0000u)};
  MATE_UNROLL
  for (int i = 0; i < 8; ++i) to[i * 32 + lane] = values[i];
}

// One warp.
MATE_KERNEL(32, 1) probe(const ProbeParams p) {
  ProbeShared& shared = *reinterpret_cast<ProbeShared*>(shared_memory());
  const Tile<kBlock> A{shared.A}, B{shared.B}, kept{shared.kept};
  const int lane = lane_index();
  copy_async(A.at(lane / 2, lane % 2 * 8), p.A + lane * 8);
  copy_async(B.at(lane / 2, lane % 2 * 8), p.B + lane * 8);
  copy_commit();
  copy_wait<0>();
  MATE_BARRIER();

  const FragA a = load_a(A, 0, 0);
  const FragB rows = load_b_rows(B, 0, 0);
  FragC c = {};
  multiply(c, a, rows);
  store_probe(p, kProductRows, c);
  FragC other = {};
  multiply(other, a, load_b_columns(B, 0, 0));
  store_probe(p, kProductColumns, other);
  uint32_t both[4];
  load_c_columns(both, A, 0, 0);
  other = widened(both);
  multiply(other, a, rows);
  store_probe(p, kAccumulated, other);
  other = FragC{};
  multiply(other, to_operand(c, shared.scratch), rows);
  store_probe(p, kOperand, other);
  const Rounded halves = rounded(c);
  store_c_rows(halves.both, kept, 0, 0);
  store_kept(p, kKeptRows, kept);
  store_c_columns(halves.both, kept, 0, 0);
  store_kept(p, kKeptColumns, kept);

  MATE_UNROLL
  for (int i = 0; i < 8; ++i) {
    p.results[kShuffled * kTileSize + i * 32 + lane] =
        shuffle_xor(static_cast<float>(lane), probe_mask(i));
  }
  probe_numbers(p.results + kNumbers * kTileSize);
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int32_t mate_gpu_probe(const void* matrices, float* results, void* stream) {
  using namespace mate::gpu;
  const uint16_t* A = static_cast<const uint16_t*>(matrices);
  const ProbeParams p = {A, A + kTileSize, results};
  const bool launched = launch(probe, 1, 32, static_cast<int>(sizeof(ProbeShared)), stream, p);
  return launched ? static_cast<int32_t>(MATE_OK) : static_cast<int32_t>(MATE_LAUNCH_FAILED);
}
