// One instruction set's entry point; compiled once per kernels_<isa>.cpp.
#pragma once

#include "chunk.h"
#include "layer.h"
#include "recurrent.h"

namespace mate {
namespace MATE_ISA {

void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  if (item.recurrent) {
    run_recurrent(args, item, scratch);
  } else {
    run_chunked(args, item, scratch);
  }
}

}  // namespace MATE_ISA
}  // namespace mate
