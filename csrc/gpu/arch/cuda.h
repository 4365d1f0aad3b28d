// CUDA, from sm_80 on: see arch.h for the names. A 16 x 16 product is two mma.sync.m16n8k16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

#define MATE_DEVICE __device__ __forceinline__
#define MATE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MATE_UNROLL _Pragma("unroll")
#define MATE_NO_UNROLL _Pragma("unroll 1")
#define MATE_BARRIER() __syncthreads()
#define MATE_WARP_BARRIER() __syncwarp()

// The build says MATE_SM_90A if it compiles for sm_90a, which the host must know as well.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && defined(MATE_SM_90A)
#define MATE_HAS_GROUP_PRODUCTS 1  // wgmma.h
#endif

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

MATE_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MATE_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MATE_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MATE_DEVICE float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MATE_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
MATE_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
MATE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
MATE_DEVICE uint16_t to_bf16(float x) {  // the packed conversion is the faster one
  return static_cast<uint16_t>(pack_bf16(x, 0.0f));
}
MATE_DEVICE float from_fp16(uint16_t half) { return __half2float(__ushort_as_half(half)); }
MATE_DEVICE uint16_t to_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }
MATE_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
MATE_DEVICE uint32_t multiply_bf16(uint32_t x, uint32_t y) {
  uint32_t both;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(x), "r"(y), "r"(0x80008000u));
  return both;
}

// ---- shuffles and copies ------------------------------------------------------------------------

MATE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

MATE_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// `valid` false: zeros, and `from` is not read.
MATE_DEVICE void copy_async(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
template <int kOffset>
MATE_DEVICE void copy_async_at(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(shared_address(to)),
               "l"(from), "n"(kOffset)
               : "memory");
}
MATE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
MATE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// ---- bulk copies --------------------------------------------------------------------------------

struct Arrival {
  uint64_t state;
};
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
// Complete with so many arrivals, and the bytes they announce.
MATE_DEVICE void prepare_arrival(Arrival& x, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&x)), "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
MATE_DEVICE void expect_bytes(Arrival& x, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&x)),
               "r"(bytes)
               : "memory");
}
MATE_DEVICE void copy_bulk(void* to, const void* from, int bytes, Arrival& x) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&x))
      : "memory");
}
// Into the L2 cache.
MATE_DEVICE void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
MATE_DEVICE void wait_arrival(Arrival& x, int times) {
  asm volatile(
      "{.reg .pred done; again: "
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra again;}" ::"r"(shared_address(&x)),
      "r"(times % 2)
      : "memory");
}
MATE_DEVICE void arrive(Arrival& x) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&x)) : "memory");
}
MATE_DEVICE void arrive_with_copies(Arrival& x) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&x))
               : "memory");
}
#else
constexpr bool kBulkCopies = false;
MATE_DEVICE void prepare_arrival(Arrival&, int) {}
MATE_DEVICE void expect_bytes(Arrival&, int) {}
MATE_DEVICE void copy_bulk(void*, const void*, int, Arrival&) {}
MATE_DEVICE void prefetch_bulk(const void*, int) {}
MATE_DEVICE void wait_arrival(Arrival&, int) {}
MATE_DEVICE void arrive(Arrival&) {}
MATE_DEVICE void arrive_with_copies(Arrival&) {}
#endif

// ---- launches that overlap ----------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
constexpr bool kEarlyLaunches = true;
MATE_DEVICE void wait_for_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
MATE_DEVICE void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Not a release: what was read has arrived in shared memory, as an mbarrier has told, so that
// nothing is left that could be overtaken. It would wait for the copies that are under way.
MATE_DEVICE void count_up(uint32_t* x) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(x) : "memory");
}
MATE_DEVICE void await_count(const uint32_t* x, uint32_t n) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(x) : "memory");
  } while (now < n);
}
#else
constexpr bool kEarlyLaunches = false;
MATE_DEVICE void wait_for_before() {}
MATE_DEVICE void let_next_begin() {}
MATE_DEVICE void count_up(uint32_t*) {}
MATE_DEVICE void await_count(const uint32_t*, uint32_t) {}
#endif

// ---- warp groups that only copy -----------------------------------------------------------------

#if defined(MATE_HAS_GROUP_PRODUCTS)
constexpr bool kProducers = true;
// Of the first kThreads threads of a block.
template <int kThreads>
MATE_DEVICE void barrier_of_first() {
  asm volatile("barrier.cta.sync 1, %0;" ::"n"(kThreads) : "memory");
}
// From here on each thread of the calling warp group has so many registers.
template <int kRegisters>
MATE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MATE_DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// The 128 bytes around `from` into the L2 cache.
MATE_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}
#else
constexpr bool kProducers = false;
template <int>
MATE_DEVICE void barrier_of_first() {}
template <int>
MATE_DEVICE void take_registers() {}
template <int>
MATE_DEVICE void leave_registers() {}
MATE_DEVICE void prefetch(const void*) {}
#endif

// ---- products -----------------------------------------------------------------------------------

// `volatile` keeps these in order with barriers, which stand between a write of any other lane and
// its reading; a memory clobber on top would only keep other values out of registers.
MATE_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}
MATE_DEVICE void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}
MATE_DEVICE void store_matrices(const uint32_t (&x)[4], void* row) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
#else
  const uint32_t address = shared_address(row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = __shfl_sync(0xffffffffu, address, i * 8 + lane_index() / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + lane_index() % 4 * 4), "r"(x[i]) : "memory");
  }
#endif
}
MATE_DEVICE void store_matrices_transposed(const uint32_t (&x)[4], void* row) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
  const uint32_t address = shared_address(row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t two;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(two) : "r"(x[i]));
    const uint32_t to = __shfl_sync(0xffffffffu, address, i * 8 + lane_index() / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + lane_index() % 4 * 4), "r"(two) : "memory");
  }
#endif
}

MATE_DEVICE void mma_sync(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
}  // namespace gpu
}  // namespace mate

#include "mma_sync.h"

namespace mate {
namespace gpu {

// ---- launching ----------------------------------------------------------------------------------

inline cudaError_t& launch_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}
inline const char* last_error() {
  return launch_error() == cudaSuccess ? "" : cudaGetErrorString(launch_error());
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
__global__ void nothing() {}

// Whether the current device runs code that was compiled for sm_90 or later: newer ones may have to
// do with older code, in which launches wait for nothing.
inline bool overlaps() {
  static std::atomic<int8_t> known[64];  // by device: 0 not asked yet, 1 no, 2 yes
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int8_t>& here = known[device % 64];
  if (here == 0) {
    cudaFuncAttributes attributes = {};
    const bool asked = cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess;
    if (!asked) cudaGetLastError();
    here = asked && attributes.ptxVersion >= 90 ? 2 : 1;
  }
  return here == 2;
}

template <class Params>
inline bool launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
                   void* stream, const Params& params, bool early = false) {
  const void* function = reinterpret_cast<const void*>(kernel);
  void* arguments[] = {const_cast<Params*>(&params)};
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {  // as much a block may have without asking
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = early && overlaps() ? 1 : 0;
    error = cudaLaunchKernelExC(&config, function, arguments);
  }
  if (error == cudaSuccess) return true;
  launch_error() = error;
  cudaGetLastError();  // reported here, not by whoever asks next
  return false;
}

// Whether the kernels that run on this device have GroupProducts of their own.
inline bool group_products() {
#if defined(MATE_SM_90A)
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}
inline int multiprocessors() {  // also where there is no device, so that the launch says so
  const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return count > 0 ? count : 1;
}
inline int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace gpu
}  // namespace mate
