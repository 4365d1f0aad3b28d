// See musa_runtime.h. The type and the conversions have the same names.
#pragma once

#include <cuda_fp16.h>
