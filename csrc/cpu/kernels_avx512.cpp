#define MATE_ISA avx512
#define MATE_SIMD_WIDTH 16
#include "item.h"
