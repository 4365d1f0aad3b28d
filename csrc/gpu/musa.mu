// The kernels for MUSA GPUs.
#define MATE_MUSA 1
#include "decode.h"
#include "forward.h"
#include "gated_norm.h"
#include "layer_step.h"
#include "probe.h"
#include "short_conv.h"
