// A GPU emulated on one CPU thread, to test kernels where there is none. See arch.h for the names.
//
// The threads of a block are fibres that give way only where they wait for one another, in an order
// drawn from a seed: whole warps racing ahead, or single threads. Shared memory starts as NaN, and
// asynchronous copies leave NaN behind until they are waited for. A barrier that some threads do
// not reach ends the launch with an error. Fragments are MP31's, by the code that musa.h runs, or
// CUDA's (MATE_GPU_HOST_MMA_SYNC), by the code that cuda.h runs: only the instructions are
// emulated.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MATE_DEVICE inline
#define MATE_KERNEL(threads, blocks) void
#define MATE_UNROLL
#define MATE_NO_UNROLL
#define MATE_BARRIER() ::mate::gpu::host::block_barrier(__COUNTER__)
#define MATE_WARP_BARRIER() ::mate::gpu::host::warp_barrier(__COUNTER__)

namespace mate {
namespace gpu {
namespace host {

struct Position {
  int thread;
  int64_t block;
};
extern const Position* here;
extern char* shared;

// `site` tells one barrier of the source from another; kNoSite cannot be dropped.
constexpr int kNoSite = -1;
extern int multiprocessors, shared_limit;  // the latter: bytes a block
void block_barrier(int site);
void warp_barrier(int site);
// The last lane to arrive runs body(all 32 lanes' data).
void collective(void (*body)(void* const* lanes), void* mine);
void copy_async(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(int groups_in_flight);
bool run(void (*thread_body)(const void*), const void* argument, int64_t blocks, int threads,
         int shared_bytes);
const char* error();
[[noreturn]] void fail(const char* what, int site = kNoSite);

}  // namespace host

inline int thread_index() { return host::here->thread; }
inline int64_t block_index() { return host::here->block; }
inline int lane_index() { return thread_index() % 32; }
inline char* shared_memory() { return host::shared; }

// ---- numbers ------------------------------------------------------------------------------------

inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_log2(float x) { return log2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_rsqrt(float x) { return 1.0f / sqrtf(x); }

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}

// fp16 arithmetic by scaling: 2^112 moves its exponents to those of fp32.
inline float from_fp16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
inline uint16_t to_fp16(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u;
  const float magnitude = fabsf(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) {  // counts 2^-24; adding 2^23 rounds to nearest even
    const float counted = magnitude * 0x1p24f + 0x1p23f;
    return static_cast<uint16_t>(sign | (to_bits(counted) & 0x7fffffu));
  }
  const uint32_t bits = to_bits(magnitude) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline uint32_t pack_fp16(float low, float high) {
  return to_fp16(low) | static_cast<uint32_t>(to_fp16(high)) << 16;
}
inline uint32_t multiply_bf16(uint32_t x, uint32_t y) {
  return pack_bf16(from_bits(x << 16) * from_bits(y << 16),
                   from_bits(x & 0xffff0000u) * from_bits(y & 0xffff0000u));
}

// ---- shuffles and copies ------------------------------------------------------------------------

// Not emulated.
struct Arrival {};
constexpr bool kBulkCopies = false;
inline void prepare_arrival(Arrival&, int) {}
inline void expect_bytes(Arrival&, int) {}
inline void copy_bulk(void*, const void*, int, Arrival&) {}
inline void prefetch_bulk(const void*, int) {}
inline void wait_arrival(Arrival&, int) {}
inline void arrive(Arrival&) {}
inline void arrive_with_copies(Arrival&) {}

constexpr bool kProducers = false;
template <int>
inline void barrier_of_first() {}
template <int>
inline void take_registers() {}
template <int>
inline void leave_registers() {}
inline void prefetch(const void*) {}

inline float shuffle_xor(float x, int mask) {
  struct Lane {
    float value, result;
    int mask;
  } mine = {x, 0.0f, mask};
  host::collective(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          Lane* lane = static_cast<Lane*>(lanes[i]);
          lane->result = static_cast<Lane*>(lanes[i ^ lane->mask])->value;
        }
      },
      &mine);
  return mine.result;
}

inline void copy_async(void* to, const void* from, bool valid = true) {
  host::copy_async(to, from, valid);
}
template <int kOffset>
inline void copy_async_at(void* to, const void* from) {
  copy_async(static_cast<char*>(to) + kOffset, static_cast<const char*>(from) + kOffset);
}
inline void copy_commit() { host::copy_commit(); }
template <int kInFlight>
inline void copy_wait() {
  host::copy_wait(kInFlight);
}

// ---- fragments ----------------------------------------------------------------------------------

#if defined(MATE_GPU_HOST_MMA_SYNC)

// Lanes 8 i to 8 i + 7 name the rows of matrix i, of 8 x 8 numbers; each lane gets two of each.
inline void load_matrices_as(uint32_t (&x)[4], const void* row, bool transposed) {
  struct Lane {
    const void* row;
    uint32_t* x;
    bool transposed;
  } mine = {row, x, transposed};
  host::collective(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          const Lane* lane = static_cast<const Lane*>(lanes[i]);
          for (int m = 0; m < 4; ++m) {
            uint16_t two[2];
            for (int e = 0; e < 2; ++e) {
              const int along = i % 4 * 2 + e, across = i / 4;
              const int r = lane->transposed ? along : across;
              const int c = lane->transposed ? across : along;
              two[e] =
                  static_cast<const uint16_t*>(static_cast<const Lane*>(lanes[m * 8 + r])->row)[c];
            }
            lane->x[m] = two[0] | static_cast<uint32_t>(two[1]) << 16;
          }
        }
      },
      &mine);
}
inline void load_matrices(uint32_t (&x)[4], const void* row) { load_matrices_as(x, row, false); }
inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  load_matrices_as(x, row, true);
}
inline void store_matrices_as(const uint32_t (&x)[4], void* row, bool transposed) {
  struct Lane {
    void* row;
    const uint32_t* x;
    bool transposed;
  } mine = {row, x, transposed};
  host::collective(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          const Lane* lane = static_cast<const Lane*>(lanes[i]);
          for (int m = 0; m < 4; ++m) {
            for (int e = 0; e < 2; ++e) {
              const int along = i % 4 * 2 + e, across = i / 4;
              const int r = lane->transposed ? along : across;
              const int c = lane->transposed ? across : along;
              void* to = static_cast<const Lane*>(lanes[m * 8 + r])->row;
              static_cast<uint16_t*>(to)[c] = static_cast<uint16_t>(lane->x[m] >> e * 16);
            }
          }
        }
      },
      &mine);
}
inline void store_matrices(const uint32_t (&x)[4], void* row) { store_matrices_as(x, row, false); }
inline void store_matrices_transposed(const uint32_t (&x)[4], void* row) {
  store_matrices_as(x, row, true);
}

// C[16][8] += A[16][16] B[16][8]
inline void mma_sync(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {c, a, {b0, b1}};
  host::collective(
      [](void* const* lanes) {
        float A[16][16], B[16][8];
        const auto lane = [&](int i) { return static_cast<const Lane*>(lanes[i]); };
        const auto number = [](uint32_t both, int e) {
          return from_bits(e ? both & 0xffff0000u : both << 16);
        };
        for (int i = 0; i < 32; ++i) {
          for (int e = 0; e < 2; ++e) {
            const int along = i % 4 * 2 + e, across = i / 4;
            for (int r = 0; r < 4; ++r) {
              A[across + r % 2 * 8][along + r / 2 * 8] = number(lane(i)->a[r], e);
            }
            for (int r = 0; r < 2; ++r) B[along + r * 8][across] = number(lane(i)->b[r], e);
          }
        }
        for (int i = 0; i < 32; ++i) {
          for (int v = 0; v < 4; ++v) {
            const int row = i / 4 + v / 2 * 8, column = i % 4 * 2 + v % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
            lane(i)->c[v] += sum;
          }
        }
      },
      &mine);
}

}  // namespace gpu
}  // namespace mate

#include "mma_sync.h"

namespace mate {
namespace gpu {

#else

// The instruction of MP31.
inline void wmma_16x16x16(float (&c)[8], const uint32_t (&a)[4], const uint32_t (&b)[4]);

}  // namespace gpu
}  // namespace mate

#include "wmma.h"

namespace mate {
namespace gpu {

inline void wmma_16x16x16(float (&c)[8], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
  } mine = {c, a, b};
  host::collective(
      [](void* const* lanes) {
        float rows[16][16], columns[16][16], sums[16][16] = {};  // columns: [k][n]
        const auto number = [](const uint32_t* x, int v) {
          return from_bits(v % 2 ? x[v / 2] & 0xffff0000u : x[v / 2] << 16);
        };
        for (int i = 0; i < 32; ++i) {
          const Lane* lane = static_cast<const Lane*>(lanes[i]);
          for (int v = 0; v < 8; ++v) {
            const int row = mp31::operand_row(i, v), k = mp31::operand_k(i, v);
            rows[row][k] = number(lane->a, v);
            columns[k][row] = number(lane->b, v);
          }
        }
        for (int m = 0; m < 16; ++m) {
          for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 16; ++n) sums[m][n] += rows[m][k] * columns[k][n];
          }
        }
        for (int i = 0; i < 32; ++i) {
          float* out = static_cast<Lane*>(lanes[i])->c;
          for (int v = 0; v < 8; ++v) out[v] += sums[mp31::c_row(i, v)][mp31::c_column(i, v)];
        }
      },
      &mine);
}

#endif

// ---- launching ----------------------------------------------------------------------------------

constexpr bool kEarlyLaunches = true;  // which run one after another
inline void wait_for_before() {}
inline void let_next_begin() {}
inline void count_up(uint32_t* x) { ++*x; }
inline void await_count(const uint32_t* x, uint32_t n) {
  if (*x != n) host::fail("a count would be awaited for ever");
}

template <class Params>
inline bool launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void*,
                   const Params& params, bool = false) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call = {kernel, &params};
  return host::run(
      [](const void* p) {
        const Call* call = static_cast<const Call*>(p);
        call->kernel(*call->params);
      },
      &call, blocks, threads, shared_bytes);
}

inline bool group_products() { return false; }
inline bool overlaps() { return true; }
inline int multiprocessors() { return host::multiprocessors; }
inline int shared_limit() { return host::shared_limit; }
inline const char* last_error() { return host::error(); }

}  // namespace gpu
}  // namespace mate
