// A few rows times the matrices of linear layers, several matrices in one launch: a decode step's
// projections. Every weight is read once, two outputs at a time by a team of lanes, a warp or half
// of one, side by side along their rows; what binds is memory.
#pragma once

#include "load.h"

namespace mate {
namespace gpu {

constexpr int kLinearThreads = 256;
constexpr int kPair = 2, kLinearAhead = 4;  // pieces of a pair asked for at a time
constexpr int kMostLinears = 6, kMostInputs = 2, kMostLinearRows = MATE_MAX_LAYER_STEP_BATCH;

// y = x W^T for the launch's rows of x.
struct Linear {
  const uint16_t* weight;  // [outputs, width]
  uint16_t* y;
  int32_t outputs, input;  // which x
  int32_t end_pair;        // of all in the launch, numbered through
};

// All in one 16-bit dtype.
struct LinearParams {
  Linear linears[kMostLinears];
  const uint16_t* x[kMostInputs];  // [rows, width]
  int64_t x_stride, y_stride;
  int32_t width, rows, team, pairs;  // width: a multiple of 8
  bool aligned;                      // weights and x, every 8 elements to 16 bytes
};

// The one that a pair of outputs belongs to, and the first of them; beyond the last pair, of none.
struct OutputPair {
  Linear linear;
  int output;

  MATE_DEVICE OutputPair(const LinearParams& p, int pair) : linear(p.linears[0]) {
    int begin = 0;
    MATE_UNROLL
    for (int i = 1; i < kMostLinears; ++i) {
      if (pair < p.linears[i - 1].end_pair) continue;
      linear = p.linears[i];
      begin = p.linears[i - 1].end_pair;
    }
    if (pair >= p.pairs) linear.outputs = linear.input = 0;
    output = (pair - begin) * kPair;
  }
  MATE_DEVICE bool has(int o) const { return output + o < linear.outputs; }
};

template <int32_t kDtype>
MATE_DEVICE float add_products(const Eight& a, const Eight& b, float sum) {
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Pair x = unpack<kDtype>(a.x[i]), y = unpack<kDtype>(b.x[i]);
    sum += x.x * y.x;
    sum += x.y * y.y;
  }
  return sum;
}

template <int32_t kDtype, int kRows>
MATE_KERNEL(kLinearThreads, kRows > 2 ? 2 : 3)
multiply_rows(const LinearParams p) {
  let_next_begin();
  const int team = p.team, lane = thread_index() % team, step = team * 8;
  const int block = static_cast<int>(block_index());
  const OutputPair mine(p, block * (kLinearThreads / team) + thread_index() / team);
  const uint16_t* const x = mine.linear.input ? p.x[1] : p.x[0];
  const uint16_t* const weight = mine.linear.weight + static_cast<int64_t>(mine.output) * p.width;

  float sum[kPair][kRows] = {};
  bool waited = false;
  for (int c = lane * 8; c < p.width || !waited; c += kLinearAhead * step) {
    Eight pieces[kLinearAhead][kPair];
    MATE_UNROLL
    for (int a = 0; a < kLinearAhead; ++a) {
      MATE_UNROLL
      for (int o = 0; o < kPair; ++o) {
        const bool there = mine.has(o) && c + a * step < p.width;
        pieces[a][o] = there ? load_eight(weight + o * p.width, c + a * step, p.aligned) : Eight{};
      }
    }
    // x comes from there, the weights do not. Threads without work wait, too: see layer_step.h.
    if (!waited) wait_for_before();
    waited = true;
    MATE_UNROLL
    for (int a = 0; a < kLinearAhead; ++a) {
      if (c + a * step >= p.width) break;
      MATE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Eight input = load_eight(x + r * p.x_stride, c + a * step, p.aligned);
        MATE_UNROLL
        for (int o = 0; o < kPair; ++o) {
          sum[o][r] = add_products<kDtype>(pieces[a][o], input, sum[o][r]);
        }
      }
    }
  }
  MATE_UNROLL
  for (int o = 0; o < kPair; ++o) {
    MATE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MATE_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        const float other = shuffle_xor(sum[o][r], mask);
        if (mask < team) sum[o][r] += other;
      }
      if (lane == 0 && mine.has(o)) {
        mine.linear.y[r * p.y_stride + mine.output + o] =
            static_cast<uint16_t>(pack<kDtype>(sum[o][r], 0.0f));
      }
    }
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <int32_t kDtype>
bool launch_linears(const LinearParams& p, bool early, void* stream) {
  static_assert(kMostLinearRows == 4, "a kernel for each number of rows");
  const auto kernel = p.rows == 1   ? multiply_rows<kDtype, 1>
                      : p.rows == 2 ? multiply_rows<kDtype, 2>
                      : p.rows == 3 ? multiply_rows<kDtype, 3>
                                    : multiply_rows<kDtype, 4>;
  const int64_t teams = kLinearThreads / p.team;
  return launch(kernel, (p.pairs + teams - 1) / teams, kLinearThreads, 0, stream, p, early);
}

// What the parameters lack is filled in: who does what.
inline bool launch_linears(LinearParams p, int count, int32_t dtype, bool early, void* stream) {
  const auto whole = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  p.team = p.width > 16 * 8 ? 32 : 16;  // short rows are half a warp's
  p.aligned = (p.rows == 1 || p.x_stride % 8 == 0) && whole(p.x[0]) && whole(p.x[1]);
  p.pairs = 0;
  for (int i = 0; i < kMostLinears; ++i) {
    if (i < count) {
      p.pairs += (p.linears[i].outputs + kPair - 1) / kPair;
      p.aligned = p.aligned && whole(p.linears[i].weight);
    }
    p.linears[i].end_pair = p.pairs;
  }
  return dtype == MATE_FLOAT16 ? launch_linears<MATE_FLOAT16>(p, early, stream)
                               : launch_linears<MATE_BFLOAT16>(p, early, stream);
}

}  // namespace gpu
}  // namespace mate
