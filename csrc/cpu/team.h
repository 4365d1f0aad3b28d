// Threads for one call, and the kernels of the instruction set in use. Defined in dispatch.cpp.
#pragma once

#include <atomic>

#include "mate/layer.h"
#include "work.h"

#define MATE_EXPORT extern "C" __attribute__((visibility("default")))

namespace mate {

// Tokens [from, to) of the document [begin, end) of one batch row, for some channels.
struct ConvItem {
  int64_t sequence, batch, begin, end;
  int64_t from, to;
  int64_t channel_begin, channel_end;
};

// A row of a decode step: one token of one sequence.
struct DecodeRow {
  int64_t batch;
  int64_t state;  // the index of its states, -1: starts from zeros and stores none
};

struct LayerKernels {
  void (*short_conv)(const mate_short_conv_args& args, const ConvItem& item);
  void (*gated_norm)(const mate_gated_norm_args& args, int64_t row_begin, int64_t row_end);
  // One value head of one sequence. The windows of q and k may be shared with other value heads:
  // they are only read, and moved on by advance_qk when all of these are done.
  void (*decode)(const mate_decode_args& args, const DecodeRow& row, int64_t head);
  void (*advance_qk)(const mate_decode_args& args, const DecodeRow& row, int64_t head_qk);
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

constexpr double kWorthAThread =
    20.0;  // microseconds: with less, a thread costs more than it brings

// Calls run(item, slot) for every item in [0, count); items share nothing and run in any order.
template <typename Run>
void run_items(int64_t count, int threads, const Run& run) {
  struct Items {
    const Run& run;
    int64_t count;
    std::atomic<int64_t> next{0};

    static void work(void* items, int slot) {
      Items& self = *static_cast<Items*>(items);
      for (int64_t i; (i = self.next.fetch_add(1)) < self.count;) self.run(i, slot);
    }
  };
  if (count <= 0) return;
  Items items{run, count};
  run_team(threads, &Items::work, &items);
}

}  // namespace mate
