// Threads for one call, and the kernels of the instruction set in use. Defined in dispatch.cpp.
#pragma once

#include "mate/layer.h"
#include "work.h"

namespace mate {

// Tokens [from, to) of the document [begin, end) of one batch row, for some channels.
struct ConvItem {
  int64_t sequence, batch, begin, end;
  int64_t from, to;
  int64_t channel_begin, channel_end;
};

struct LayerKernels {
  void (*short_conv)(const mate_short_conv_args& args, const ConvItem& item);
  void (*gated_norm)(const mate_gated_norm_args& args, int64_t row_begin, int64_t row_end);
  // One value head of one sequence. The windows of q and k may be shared with other value heads:
  // they are only read, and moved on by advance_qk when all of these are done.
  void (*decode)(const mate_decode_args& args, int64_t batch, int64_t head);
  void (*advance_qk)(const mate_decode_args& args, int64_t batch, int64_t head_qk);
};

namespace portable {
extern const LayerKernels layer_kernels;
}
namespace avx2 {
extern const LayerKernels layer_kernels;
}
namespace avx512 {
extern const LayerKernels layer_kernels;
}

const LayerKernels& current_layer_kernels();

// Calls work(context, slot) on up to `threads` threads of the caller's pool, each with a slot of
// its own below `threads`, and returns when all have finished. Right for any number of threads that
// arrive; denormal numbers are flushed meanwhile.
void run_team(int threads, void (*work)(void* context, int slot), void* context);

}  // namespace mate
