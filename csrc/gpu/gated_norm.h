// The gated RMS norm behind the recurrence. Rows of 128 elements of 16 bits are 16 lanes' with 16
// bytes each, several rows at a time; any other row is a warp's, element by element.
#pragma once

#include "decode.h"
#include "load.h"

namespace mate {
namespace gpu {

constexpr int kNormThreads = 256, kNormStep = 4;  // rows of 16 lanes asked for at a time

struct NormParams {
  mate_gated_norm_args args;
  uint32_t rows;
};

struct NormRow {
  int64_t i, j, k;
};
MATE_DEVICE NormRow norm_row(const NormParams& p, uint32_t row) {
  const uint32_t size1 = static_cast<uint32_t>(p.args.size[1]);
  const uint32_t size2 = static_cast<uint32_t>(p.args.size[2]);
  if (size1 == 1 && size2 == p.rows) return {0, 0, row};  // no division
  const uint32_t rest = row / size2, i = rest / size1;
  return {i, rest - i * size1, row - rest * size2};
}

template <int32_t kDtype>
MATE_KERNEL(kNormThreads, 3)
gated_norm_128(const NormParams p) {
  const mate_gated_norm_args& a = p.args;
  const int lane = thread_index() % 16, channel = lane * 8;
  constexpr uint32_t kRowsAtOnce = kNormThreads / 16;
  const uint32_t first =
      static_cast<uint32_t>(block_index()) * kRowsAtOnce * kNormStep + thread_index() / 16;
  Eight x[kNormStep], gate[kNormStep];
  char* to[kNormStep];
  MATE_UNROLL
  for (int r = 0; r < kNormStep; ++r) {
    x[r] = gate[r] = {};
    const uint32_t row = first + r * kRowsAtOnce;
    to[r] = nullptr;
    if (row >= p.rows) continue;
    const NormRow at = norm_row(p, row);
    x[r] = load_eight(row_at(a.x, at.i, at.j, at.k), channel, true);
    gate[r] = load_eight(row_at(a.gate, at.i, at.j, at.k), channel, true);
    to[r] = row_at(a.output, at.i, at.j, at.k);
  }
  float weight[8];
  MATE_UNROLL
  for (int c = 0; c < 8; ++c) {
    weight[c] = load_element(a.weight.data, channel + c, a.weight.dtype);
  }
  MATE_UNROLL
  for (int r = 0; r < kNormStep; ++r) {
    float sum = 0.0f;
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Pair two = unpack<kDtype>(x[r].x[i]);
      sum += two.x * two.x;
      sum += two.y * two.y;
    }
    MATE_UNROLL
    for (int mask = 1; mask < 16; mask *= 2) sum += shuffle_xor(sum, mask);
    if (!to[r]) continue;
    const float scale = fast_rsqrt(sum / kDim + a.eps);
    Eight out;
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Pair two = unpack<kDtype>(x[r].x[i]), opened = unpack<kDtype>(gate[r].x[i]);
      out.x[i] = pack<kDtype>(two.x * scale * weight[2 * i] * sigmoid(opened.x),
                              two.y * scale * weight[2 * i + 1] * sigmoid(opened.y));
    }
    store_eight(to[r], channel, true, out);
  }
}

MATE_KERNEL(kNormThreads, 4) gated_norm_any(const NormParams p) {
  const mate_gated_norm_args& a = p.args;
  const uint32_t row =
      static_cast<uint32_t>(block_index()) * (kNormThreads / 32) + thread_index() / 32;
  if (row >= p.rows) return;  // whole warps
  const NormRow at = norm_row(p, row);
  const char* x = row_at(a.x, at.i, at.j, at.k);
  const char* gate = row_at(a.gate, at.i, at.j, at.k);
  char* to = row_at(a.output, at.i, at.j, at.k);
  float sum = 0.0f;
  for (int64_t c = lane_index(); c < a.dim; c += 32) {
    const float e = load_element(x, c, a.x.dtype);
    sum += e * e;
  }
  const float scale = fast_rsqrt(warp_sum(sum) / static_cast<float>(a.dim) + a.eps);
  for (int64_t c = lane_index(); c < a.dim; c += 32) {
    const float weight = load_element(a.weight.data, c, a.weight.dtype);
    const float opened = sigmoid(load_element(gate, c, a.gate.dtype));
    store_element(to, c, a.output.dtype, load_element(x, c, a.x.dtype) * scale * weight * opened);
  }
}

// ---- launching ----------------------------------------------------------------------------------

// Dimensions that lie one behind the other in every tensor become one.
inline void merge_dimensions(mate_gated_norm_args& a) {
  mate_tensor* const tensors[] = {&a.x, &a.gate, &a.output};
  for (int i = 1; i >= 0; --i) {
    bool merges = true;
    for (const mate_tensor* x : tensors) {
      merges =
          merges && (a.size[i] == 1 || a.size[2] == 1 || x->stride[i] == x->stride[2] * a.size[2]);
    }
    if (!merges) return;
    for (mate_tensor* x : tensors) {
      if (a.size[2] == 1) x->stride[2] = x->stride[i];
    }
    a.size[2] *= a.size[i];
    a.size[i] = 1;
  }
}

inline int32_t run_gated_norm(const mate_gated_norm_args& args, void* stream) {
  if (!known_dtype(args.x.dtype) || !known_dtype(args.gate.dtype) ||
      !known_dtype(args.output.dtype) || !known_dtype(args.weight.dtype)) {
    return MATE_UNSUPPORTED;
  }
  const int64_t* size = args.size;
  if (size[0] <= 0 || size[1] <= 0 || size[2] <= 0 || args.dim <= 0) return MATE_OK;
  if (size[0] > INT32_MAX || size[1] > INT32_MAX / size[0] ||
      size[2] > INT32_MAX / (size[0] * size[1])) {
    return MATE_UNSUPPORTED;
  }
  NormParams p = {};
  p.args = args;
  p.rows = static_cast<uint32_t>(size[0] * size[1] * size[2]);
  const auto fits = [&](const mate_tensor& x) {
    return x.dtype == args.x.dtype && rows_aligned(x, size[0], size[1], size[2]);
  };
  const bool whole = args.dim == kDim && args.x.dtype != MATE_FLOAT32 && fits(args.x) &&
                     fits(args.gate) && fits(args.output);
  merge_dimensions(p.args);
  const int64_t rows = whole ? kNormThreads / 16 * kNormStep : kNormThreads / 32;
  const auto kernel = !whole                         ? gated_norm_any
                      : args.x.dtype == MATE_FLOAT16 ? gated_norm_128<MATE_FLOAT16>
                                                     : gated_norm_128<MATE_BFLOAT16>;
  if (!launch(kernel, (p.rows + rows - 1) / rows, kNormThreads, 0, stream, p)) {
    return MATE_LAUNCH_FAILED;
  }
  return MATE_OK;
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int32_t mate_gpu_gated_norm(const mate_gated_norm_args* args, void* stream) {
  return mate::gpu::run_gated_norm(*args, stream);
}
