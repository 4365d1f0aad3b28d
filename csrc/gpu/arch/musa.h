// MUSA, MP31 (warps of 32): see arch.h for the names. Written to public interfaces alone and never
// run on a MUSA GPU: docs/musa.md says what was checked instead, and how.
//
// No inline assembly, which porting layers silently turn into dead code, and nothing asynchronous:
// copies are plain loads and stores, so that barriers are all that orders memory.
#pragma once

#include <musa_bf16.h>
#include <musa_fp16.h>
#include <musa_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__MUSA_ARCH__) && __MUSA_ARCH__ != 310
#error "mate's kernels are for MP31 (--offload-arch=mp_31): other MUSA GPUs have other fragments"
#endif
#if defined(__MUSACC_VER_MAJOR__) && defined(__MUSACC_VER_MINOR__)
#if __MUSACC_VER_MAJOR__ * 100 + __MUSACC_VER_MINOR__ < 501
#error "mate's kernels need MTCC 5.1 or newer"
#endif
#endif

#define MATE_DEVICE __device__ __forceinline__
// How many blocks shall fit a multiprocessor was found on another GPU and means nothing here.
#define MATE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads)
#define MATE_UNROLL _Pragma("unroll")
#define MATE_NO_UNROLL _Pragma("unroll 1")
#define MATE_BARRIER() __syncthreads()
#define MATE_WARP_BARRIER() __syncwarp()

namespace mate {
namespace gpu {

MATE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MATE_DEVICE int64_t block_index() { return blockIdx.x; }
MATE_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
MATE_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char mate_shared[];
  return mate_shared;
}

// ---- numbers ------------------------------------------------------------------------------------

MATE_DEVICE float fast_exp2(float x) { return exp2f(x); }
MATE_DEVICE float fast_log2(float x) { return log2f(x); }
MATE_DEVICE float fast_reciprocal(float x) { return 1.0f / x; }
MATE_DEVICE float fast_rsqrt(float x) { return rsqrtf(x); }

template <class To, class From>
MATE_DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
MATE_DEVICE float from_bits(uint32_t bits) { return same_bits<float>(bits); }
MATE_DEVICE uint32_t to_bits(float x) { return same_bits<uint32_t>(x); }
MATE_DEVICE uint32_t pack_bf16(float low, float high) {
  return same_bits<uint32_t>(__floats2bfloat162_rn(low, high));
}
MATE_DEVICE uint16_t to_bf16(float x) { return same_bits<uint16_t>(__float2bfloat16_rn(x)); }
MATE_DEVICE float from_fp16(uint16_t half) { return __half2float(same_bits<__half>(half)); }
MATE_DEVICE uint16_t to_fp16(float x) { return same_bits<uint16_t>(__float2half_rn(x)); }
MATE_DEVICE uint32_t pack_fp16(float low, float high) {
  return to_fp16(low) | static_cast<uint32_t>(to_fp16(high)) << 16;
}
MATE_DEVICE uint32_t multiply_bf16(uint32_t x, uint32_t y) {
  return pack_bf16(from_bits(x << 16) * from_bits(y << 16),
                   from_bits(x & 0xffff0000u) * from_bits(y & 0xffff0000u));
}

// ---- shuffles and copies ------------------------------------------------------------------------

MATE_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask, 32);
}

struct alignas(16) SixteenBytes {
  uint32_t x[4];
};
// Done when it returns. `valid` false: zeros, and `from` is not read.
MATE_DEVICE void copy_async(void* to, const void* from, bool valid = true) {
  SixteenBytes x = {};
  if (valid) x = *static_cast<const SixteenBytes*>(from);
  *static_cast<SixteenBytes*>(to) = x;
}
template <int kOffset>
MATE_DEVICE void copy_async_at(void* to, const void* from) {
  copy_async(static_cast<char*>(to) + kOffset, static_cast<const char*>(from) + kOffset);
}
MATE_DEVICE void copy_commit() {}
template <int kInFlight>
MATE_DEVICE void copy_wait() {}

// ---- what this architecture does without --------------------------------------------------------

struct Arrival {};
constexpr bool kBulkCopies = false;
MATE_DEVICE void prepare_arrival(Arrival&, int) {}
MATE_DEVICE void expect_bytes(Arrival&, int) {}
MATE_DEVICE void copy_bulk(void*, const void*, int, Arrival&) {}
MATE_DEVICE void prefetch_bulk(const void*, int) {}
MATE_DEVICE void wait_arrival(Arrival&, int) {}
MATE_DEVICE void arrive(Arrival&) {}
MATE_DEVICE void arrive_with_copies(Arrival&) {}

constexpr bool kProducers = false;
template <int>
MATE_DEVICE void barrier_of_first() {}
template <int>
MATE_DEVICE void take_registers() {}
template <int>
MATE_DEVICE void leave_registers() {}
MATE_DEVICE void prefetch(const void*) {}

// A launch begins when the one before it on its stream has ended.
constexpr bool kEarlyLaunches = false;
MATE_DEVICE void wait_for_before() {}
MATE_DEVICE void let_next_begin() {}
MATE_DEVICE void count_up(uint32_t*) {}
MATE_DEVICE void await_count(const uint32_t*, uint32_t) {}

// ---- products -----------------------------------------------------------------------------------

// Which operands are K-major, as the instruction wants it said: 1 is both. Published wrappers agree
// for this case only in one reading; if `python -m mate selftest` finds products wrong and all else
// right, a build with 0 is the first thing to try.
#if !defined(MATE_MUSA_OPERAND_LAYOUT)
#define MATE_MUSA_OPERAND_LAYOUT 1
#endif

MATE_DEVICE void wmma_16x16x16(float (&c)[8], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#if defined(__MUSA_ARCH__)
  constexpr int kBf16 = 3;  // both operands
  int32_t left[4], right[4], sums[8];
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    left[i] = static_cast<int32_t>(a[i]);
    right[i] = static_cast<int32_t>(b[i]);
  }
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) sums[v] = same_bits<int32_t>(c[v]);
  __musa_wmma_m16n16k16_mma(sums, left, right, sums, 0, 0, 0, 0, 0, MATE_MUSA_OPERAND_LAYOUT,
                            kBf16);
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) c[v] = same_bits<float>(sums[v]);
#else
  (void)c, (void)a, (void)b;  // the host's pass knows no such instruction
#endif
}

}  // namespace gpu
}  // namespace mate

#include "wmma.h"

namespace mate {
namespace gpu {

// ---- launching ----------------------------------------------------------------------------------

inline char* launch_error() {
  static thread_local char text[256] = "";
  return text;
}
inline const char* last_error() { return launch_error(); }

inline int device_attribute(musaDeviceAttr attribute) {
  int device = 0, value = 0;
  musaGetDevice(&device);
  musaDeviceGetAttribute(&value, attribute, device);
  return value;
}
// `early`: it may begin before the launch before it has ended, which nothing here makes use of.
template <class Params>
inline bool launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
                   void* stream, const Params& params, bool early = false) {
  (void)early;
  const int lanes = device_attribute(musaDevAttrWarpSize);
  if (lanes != 32) {
    snprintf(launch_error(), 256, "the kernels need warps of 32 threads, this device has %d",
             lanes);
    return false;
  }
  const void* function = reinterpret_cast<const void*>(kernel);
  musaError_t error =
      musaFuncSetAttribute(function, musaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == musaSuccess) {
    kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
             static_cast<size_t>(shared_bytes), static_cast<musaStream_t>(stream)>>>(params);
    error = musaGetLastError();
  } else {
    musaGetLastError();  // reported here, not by whoever asks next
  }
  if (error == musaSuccess) return true;
  snprintf(launch_error(), 256, "%s", musaGetErrorString(error));
  return false;
}

inline bool group_products() { return false; }
inline bool overlaps() { return false; }
inline int multiprocessors() {  // also where there is no device, so that the launch says so
  const int count = device_attribute(musaDevAttrMultiProcessorCount);
  return count > 0 ? count : 1;
}
inline int shared_limit() { return 192 << 10; }  // what a block may have on MP31

}  // namespace gpu
}  // namespace mate
