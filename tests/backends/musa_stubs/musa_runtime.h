// Bare declarations, under MUSA's names alone, of what csrc/gpu/musa.mu uses: for a syntax pass by
// clang, which mcc is made from. Nothing of CUDA's is included, so that a name that only CUDA has
// does not compile.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(STUB_ARCH)  // tests try others
#define STUB_ARCH 310
#define STUB_MAJOR 5
#define STUB_MINOR 1
#endif
#if defined(__CUDA_ARCH__)  // clang's word for a pass for a device
#define __MUSA_ARCH__ STUB_ARCH
#endif
#define __MUSACC__ 1
#define __MUSACC_VER_MAJOR__ STUB_MAJOR
#define __MUSACC_VER_MINOR__ STUB_MINOR

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  __host__ __device__ dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern const __device__ uint3 threadIdx, blockIdx;

enum musaError_t { musaSuccess };
enum musaDeviceAttr { musaDevAttrWarpSize, musaDevAttrMultiProcessorCount };
enum musaFuncAttribute { musaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct musaStream* musaStream_t;
musaError_t musaGetDevice(int*);
musaError_t musaDeviceGetAttribute(int*, musaDeviceAttr, int);
musaError_t musaFuncSetAttribute(const void*, musaFuncAttribute, int);
musaError_t musaGetLastError();
const char* musaGetErrorString(musaError_t);

__device__ void __syncthreads();
__device__ void __syncwarp(unsigned mask = 0xffffffffu);
__device__ float __shfl_xor_sync(unsigned mask, float x, int lanes, int width = 32);
__device__ void __musa_wmma_m16n16k16_mma(int32_t* d, const int32_t* a, const int32_t* b,
                                          const int32_t* c, int, int, int, int, int, int, int);

// What clang itself calls for `kernel<<<...>>>`.
extern "C" unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*);
extern "C" int cudaConfigureCall(dim3, dim3, size_t = 0, musaStream_t = nullptr);
extern "C" int cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, musaStream_t);

extern "C" {
__device__ float exp2f(float) noexcept;
__device__ float expf(float) noexcept;
__device__ float expm1f(float) noexcept;
__device__ float log1pf(float) noexcept;
__device__ float log2f(float) noexcept;
__device__ float rsqrtf(float) noexcept;
__device__ float fabsf(float) noexcept;
__device__ float fmaxf(float, float) noexcept;
__device__ float fminf(float, float) noexcept;
__device__ void* memcpy(void*, const void*, size_t) noexcept;
}
