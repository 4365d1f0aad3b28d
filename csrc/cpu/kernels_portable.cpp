#define MATE_ISA portable
#define MATE_SIMD_WIDTH 4
#include "item.h"
