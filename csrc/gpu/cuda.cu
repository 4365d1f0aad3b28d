// The kernels for NVIDIA GPUs.
#include "decode.h"
#include "forward.h"
#include "gated_norm.h"
#include "layer_step.h"
#include "probe.h"
#include "short_conv.h"
