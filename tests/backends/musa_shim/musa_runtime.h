// The MUSA runtime's names that csrc/gpu uses, for nvcc: so that csrc/gpu/musa.mu runs on an NVIDIA
// GPU. The warp product is MP31's to the last register: see mma_sync.h in csrc/gpu/arch for CUDA's.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#if defined(__CUDA_ARCH__)
#define __MUSA_ARCH__ 310
#endif

using musaError_t = cudaError_t;
using musaStream_t = cudaStream_t;
using musaDeviceAttr = cudaDeviceAttr;
constexpr musaError_t musaSuccess = cudaSuccess;
constexpr musaDeviceAttr musaDevAttrWarpSize = cudaDevAttrWarpSize;
constexpr musaDeviceAttr musaDevAttrMultiProcessorCount = cudaDevAttrMultiProcessorCount;
constexpr cudaFuncAttribute musaFuncAttributeMaxDynamicSharedMemorySize =
    cudaFuncAttributeMaxDynamicSharedMemorySize;

inline musaError_t musaGetDevice(int* device) { return cudaGetDevice(device); }
inline musaError_t musaDeviceGetAttribute(int* value, musaDeviceAttr attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
inline musaError_t musaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                        int value) {
  return cudaFuncSetAttribute(function, attribute, value);
}
inline musaError_t musaGetLastError() { return cudaGetLastError(); }
inline const char* musaGetErrorString(musaError_t error) { return cudaGetErrorString(error); }

// D = C + A B with operands and accumulators as MP31 has them in registers (csrc/gpu/arch/mp31.h),
// by two products of CUDA's and shuffles.
__device__ __forceinline__ void __musa_wmma_m16n16k16_mma(int32_t* d, const int32_t* a,
                                                          const int32_t* b, const int32_t* c, int,
                                                          int, int, int saturate, int format,
                                                          int layout, int types) {
  // Both operands K-major, both bf16: all else is another instruction.
  if (saturate != 0 || format != 0 || layout != 1 || types != 3) __trap();
  const int lane = static_cast<int>(threadIdx.x & 31);
  float sums[2][4] = {};  // of columns 0..7 and 8..15, as CUDA has them
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float* s = sums[j];
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[2 * j]), "r"(b[2 * j + 1]));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // row lane / 8 + 4 i, columns lane % 8 and 8 more
    const int row = lane / 8 + 4 * i, from = row % 8 * 4 + lane % 8 / 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float even = __shfl_sync(0xffffffffu, sums[j][i / 2 * 2], from);
      const float odd = __shfl_sync(0xffffffffu, sums[j][i / 2 * 2 + 1], from);
      const float sum = __int_as_float(c[2 * i + j]) + (lane % 2 ? odd : even);
      d[2 * i + j] = __float_as_int(sum);
    }
  }
}
