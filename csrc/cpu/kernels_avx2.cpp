// AVX2, FMA and F16C: 8 floats a vector.
#define MATE_ISA avx2
#define MATE_SIMD_WIDTH 8
#include "item.h"
