// What one thread takes at a time, and the limits that the planner and the kernels share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mate/kda.h"

namespace mate {

constexpr int kDim = MATE_HEAD_DIM;
constexpr int kTile = 16;                    // tokens that the chunked kernel handles together
constexpr int kBurst = 64;                   // tokens that the recurrent kernel prepares together
constexpr int kMaxWidth = 16;                // floats in the widest vector
constexpr int kTokenFloats = 4 * kDim + 16;  // what the recurrent kernel keeps of a token
constexpr int kSpanFloats = 46 * 1024;       // what the AMX kernel keeps of 32 tokens
constexpr int kMaxHeads = 8;                 // value heads of a work item
constexpr int kColumnQuantum = 32;  // value channels: work items are cut at multiples of this

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens [begin, end) of one batch row, for a few value heads and some of their value channels.
// Value channels never mix, so that items share nothing and may run in any order.
struct WorkItem {
  int64_t state;  // the index of its state, -1: starts from zeros and stores none
  int64_t batch, begin, end;
  int64_t head_begin, head_end;
  int32_t column_begin, column_end;
  bool recurrent;
};

// One instruction set's kernel. `scratch` is aligned to 64 bytes, plan.h says how large.
typedef void (*RunItem)(const mate_kda_args& args, const WorkItem& item, float* scratch);

namespace portable {
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch);
}
namespace avx2 {
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch);
}
namespace avx512 {
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch);
}
namespace amx {
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch);
}

}  // namespace mate
