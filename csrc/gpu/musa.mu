// The kernels for MUSA GPUs.
#define MATE_MUSA 1
#include "forward.h"
#include "probe.h"
