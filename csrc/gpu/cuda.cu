// The kernels for NVIDIA GPUs.
#include "decode.h"
#include "forward.h"
