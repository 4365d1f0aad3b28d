// The kernels for NVIDIA GPUs.
#include "forward.h"
#include "probe.h"
