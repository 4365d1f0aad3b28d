// AVX-512 F, BW, DQ, VL: 16 floats a vector.
#define MATE_ISA avx512
#define MATE_SIMD_WIDTH 16
#include "item.h"
