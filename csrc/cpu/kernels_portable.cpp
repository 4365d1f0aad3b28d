// Any processor: 4 floats a vector (SSE2, NEON).
#define MATE_ISA portable
#define MATE_SIMD_WIDTH 4
#include "item.h"
