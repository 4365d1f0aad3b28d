// See musa_runtime.h.
#pragma once

#include "musa_runtime.h"

struct __mt_bfloat16 {
  unsigned short bits;
};
struct __mt_bfloat162 {
  __mt_bfloat16 x, y;
};
__device__ __mt_bfloat16 __float2bfloat16_rn(float);
__device__ __mt_bfloat162 __floats2bfloat162_rn(float, float);
