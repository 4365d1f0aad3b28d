// The kernels for NVIDIA GPUs.
#include "forward.h"
