// CUDA, from sm_80 on: see arch.h for the names. A 16 x 16 product is two mma.sync.m16n8k16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define MATE_DEVICE __device__ __forceinline__
#define MATE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MATE_UNROLL _Pragma("unroll")
#define MATE_NO_UNROLL _Pragma("unroll 1")
#define MATE_BARRIER() __syncthreads()
#define MATE_WARP_BARRIER() __syncwarp()

namespace mate {
namespace gpu {

MATE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MATE_DEVICE int64_t block_index() { return blockIdx.x; }
MATE_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
MATE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char mate_shared[];
  return mate_shared;
}

// ---- numbers ------------------------------------------------------------------------------------

MATE_DEVICE float fast_exp(float x) { return __expf(x); }
MATE_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
MATE_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
MATE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
MATE_DEVICE float from_fp16(uint16_t half) { return __half2float(__ushort_as_half(half)); }
MATE_DEVICE uint16_t to_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }

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
MATE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
MATE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// ---- fragments ----------------------------------------------------------------------------------

struct FragA {
  uint32_t x[4];  // row lane / 4 (+ 8 in 1 and 3), columns lane % 4 * 2 + 0..1 (+ 8 in 2 and 3)
};
struct FragB {
  uint32_t x[4];  // column lane / 4 (+ 8 in 2 and 3), rows lane % 4 * 2 + 0..1 (+ 8 in 1 and 3)
};
struct FragC {
  float x[8];
};
constexpr int kScratch = 0;

MATE_DEVICE int row_of(int v) { return lane_index() / 4 + v / 2 % 2 * 8; }
MATE_DEVICE int column_of(int v) { return lane_index() % 4 * 2 + v % 2 + v / 4 * 8; }

MATE_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
MATE_DEVICE void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// A[m][k] = tile[row + m][column + k]
template <class Tile>
MATE_DEVICE FragA load_a(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragA a;
  load_matrices(a.x, tile.at(row + lane % 16, column + lane / 16 * 8));
  return a;
}
// B[k][n] = tile[row + n][column + k]
template <class Tile>
MATE_DEVICE FragB load_b_columns(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragB b;
  load_matrices(b.x, tile.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
  return b;
}
// B[k][n] = tile[row + k][column + n]
template <class Tile>
MATE_DEVICE FragB load_b_rows(const Tile& tile, int row, int column) {
  const int lane = lane_index();
  FragB b;
  load_matrices_transposed(b.x, tile.at(row + lane % 16, column + lane / 16 * 8));
  return b;
}

MATE_DEVICE void multiply_half(float* c, const FragA& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
MATE_DEVICE void multiply(FragC& c, const FragA& a, const FragB& b) {
  multiply_half(c.x, a, b.x[0], b.x[1]);
  multiply_half(c.x + 4, a, b.x[2], b.x[3]);
}

// Here an accumulator has an operand's layout: registers are enough.
MATE_DEVICE FragA to_operand(const FragC& c, uint16_t*) {
  return {{pack_bf16(c.x[0], c.x[1]), pack_bf16(c.x[2], c.x[3]), pack_bf16(c.x[4], c.x[5]),
           pack_bf16(c.x[6], c.x[7])}};
}

// ---- launching ----------------------------------------------------------------------------------

inline cudaError_t& launch_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}
inline const char* last_error() {
  return launch_error() == cudaSuccess ? "" : cudaGetErrorString(launch_error());
}

template <class Params>
inline bool launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
                   void* stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  void* arguments[] = {const_cast<Params*>(&params)};
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                             arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return true;
  launch_error() = error;
  cudaGetLastError();  // reported here, not by whoever asks next
  return false;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace gpu
}  // namespace mate
