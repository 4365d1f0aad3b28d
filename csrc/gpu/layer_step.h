// One token of a few sequences through a whole layer in four launches: the projections of the
// hidden state, both gates' second halves, the inner layer, the output projection. Each launch has
// its weights under way before the one before it has ended.
#pragma once

#include "decode.h"
#include "linear.h"

namespace mate {
namespace gpu {

// Where the rows between the launches lie in the workspace: one row a sequence, all pieces at
// multiples of 16 bytes.
struct LayerStepRows {
  int64_t q, k, v, f, g, beta, decay, gate, output, stride;

  explicit LayerStepRows(const mate_layer_step_args& a) {
    const int64_t keys = a.decode.heads_qk * kDim, values = a.decode.heads_v * kDim;
    int64_t at = 0;
    const auto place = [&](int64_t size) {
      const int64_t begin = at;
      at += (size + 7) / 8 * 8;
      return begin;
    };
    q = place(keys);
    k = place(keys);
    v = place(values);
    f = place(a.rank);
    g = place(a.rank);
    beta = place(a.decode.heads_v);
    decay = place(values);
    gate = place(values);
    output = place(values);
    stride = at;
  }
};

// The decode step between the projections; without addresses of its rows.
inline mate_decode_args decode_of(const mate_layer_step_args& a, const LayerStepRows& at) {
  mate_decode_args d = a.decode;
  uint16_t* const rows = static_cast<uint16_t*>(a.workspace);
  const auto piece = [&](int64_t begin) { return mate_rows{rows + begin, at.stride, a.x.dtype}; };
  d.q = piece(at.q);
  d.k = piece(at.k);
  d.v = piece(at.v);
  d.g = piece(at.decay);
  d.beta = piece(at.beta);
  d.output_gate = piece(at.gate);
  d.output = piece(at.output);
  return d;
}

inline bool serves_layer_step(const mate_layer_step_args& a) {
  const int32_t dtype = a.x.dtype;
  const int64_t batch = a.decode.batch;
  const auto fits = [](int64_t width) {
    return width > 0 && width % 8 == 0 && width < INT32_MAX / 16;
  };
  return (dtype == MATE_FLOAT16 || dtype == MATE_BFLOAT16) && a.y.dtype == dtype && batch >= 1 &&
         batch <= kMostLinearRows && fits(a.hidden) && fits(a.rank) &&
         fits(a.decode.heads_v * kDim) && serves_decode(decode_of(a, LayerStepRows(a)));
}

// The first launch waits for all that the caller has queued; each of the others may begin when the
// blocks of the one before run. `decode` reads what the launch two before it wrote: so every thread
// of a launch must wait for the one before, whether or not it has something to do.
inline int32_t run_layer_step(const mate_layer_step_args& a, void* stream) {
  if (!serves_layer_step(a)) return MATE_UNSUPPORTED;
  const LayerStepRows at(a);
  const mate_decode_args decode = decode_of(a, at);
  uint16_t* const rows = static_cast<uint16_t*>(a.workspace);
  const int64_t keys = decode.heads_qk * kDim, values = decode.heads_v * kDim;
  LinearParams p = {};
  p.rows = static_cast<int32_t>(decode.batch);
  const auto inputs = [&](const void* x, const void* second, int64_t stride, int64_t width) {
    p.x[0] = static_cast<const uint16_t*>(x);
    p.x[1] = static_cast<const uint16_t*>(second);
    p.x_stride = stride;
    p.width = static_cast<int32_t>(width);
  };
  const auto linear = [&](int i, const void* weight, void* y, int64_t outputs, int32_t input) {
    p.linears[i] = {static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(y),
                    static_cast<int32_t>(outputs), input, 0};
  };
  p.y_stride = at.stride;
  inputs(a.x.data, nullptr, a.x.stride, a.hidden);
  linear(0, a.q_proj, rows + at.q, keys, 0);
  linear(1, a.k_proj, rows + at.k, keys, 0);
  linear(2, a.v_proj, rows + at.v, values, 0);
  linear(3, a.f_a_proj, rows + at.f, a.rank, 0);
  linear(4, a.g_a_proj, rows + at.g, a.rank, 0);
  linear(5, a.b_proj, rows + at.beta, decode.heads_v, 0);
  if (!launch_linears(p, 6, a.x.dtype, false, stream)) return MATE_LAUNCH_FAILED;

  inputs(rows + at.f, rows + at.g, at.stride, a.rank);
  linear(0, a.f_b_proj, rows + at.decay, values, 0);
  linear(1, a.g_b_proj, rows + at.gate, values, 1);
  if (!launch_linears(p, 2, a.x.dtype, true, stream)) return MATE_LAUNCH_FAILED;

  const int32_t status = run_decode(decode, stream, true);
  if (status != MATE_OK) return status;

  p.y_stride = a.y.stride;
  inputs(rows + at.output, nullptr, at.stride, values);
  linear(0, a.o_proj, a.y.data, a.hidden, 0);
  if (!launch_linears(p, 1, a.x.dtype, true, stream)) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int64_t mate_gpu_layer_step_workspace(const mate_layer_step_args* args) {
  using namespace mate::gpu;
  if (!serves_layer_step(*args)) return -1;
  return args->decode.batch * LayerStepRows(*args).stride * 2;
}

MATE_EXPORT int32_t mate_gpu_layer_step(const mate_layer_step_args* args, void* stream) {
  return mate::gpu::run_layer_step(*args, stream);
}
