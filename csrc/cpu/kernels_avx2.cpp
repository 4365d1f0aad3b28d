#define MATE_ISA avx2
#define MATE_SIMD_WIDTH 8
#include "item.h"
