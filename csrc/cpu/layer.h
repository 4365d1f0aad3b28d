// What surrounds the recurrence in a layer: short convolution, gated norm, a whole decode step.
#pragma once

#include "recurrent.h"
#include "team.h"

namespace mate {
namespace MATE_ISA {

constexpr int kConvTokens = 16;    // rows convolved together
constexpr int kConvColumns = 256;  // channels of them: what fits the first cache as floats
constexpr int kMaxConvWidth = MATE_MAX_CONV_WIDTH;

MATE_INLINE Vec silu(Vec x) { return x / (exp(-x) + 1.0f); }

// The first n lanes, n <= kWidth; the others are 0 and are not touched in memory.
MATE_INLINE Vec load_some(int32_t dtype, const void* p, int64_t index, int64_t n) {
  if (n >= kWidth) return load_as(dtype, p, index);
  const int64_t size = element_size(dtype);
  char raw[4 * kWidth] = {};
  __builtin_memcpy(raw, static_cast<const char*>(p) + index * size, n * size);
  return load_as(dtype, raw, 0);
}

MATE_INLINE void store_some(int32_t dtype, void* p, int64_t index, int64_t n, Vec x) {
  if (n >= kWidth) return store_as(dtype, p, index, x);
  const int64_t size = element_size(dtype);
  char raw[4 * kWidth];
  store_as(dtype, raw, 0, x);
  __builtin_memcpy(static_cast<char*>(p) + index * size, raw, n * size);
}

MATE_INLINE void to_floats_as(int32_t dtype, const void* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kWidth) store(to + i, load_some(dtype, from, i, n - i));
}

// Writes whole vectors: `to` has room for n rounded up to them.
static void to_floats(int32_t dtype, const void* from, int64_t n, float* to) {
  if (dtype == MATE_FLOAT32) {
    to_floats_as(MATE_FLOAT32, from, n, to);  // constants where this is inlined
  } else if (dtype == MATE_BFLOAT16) {
    to_floats_as(MATE_BFLOAT16, from, n, to);
  } else {
    to_floats_as(MATE_FLOAT16, from, n, to);
  }
}

MATE_INLINE const void* advanced(const void* p, int32_t dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * element_size(dtype);
}

MATE_INLINE void copy_element(int64_t size, const void* from, void* to) {
  if (size == 4) {
    __builtin_memcpy(to, from, 4);
  } else {
    __builtin_memcpy(to, from, 2);
  }
}

// ---- short convolution --------------------------------------------------------------------------

// The past of a tile, then its tokens, as floats; and the weights, one row a tap.
struct ConvTile {
  float rows[kMaxConvWidth - 1 + kConvTokens][kConvColumns];
  float taps[kMaxConvWidth][kConvColumns];
};

static void load_taps(const mate_short_conv_args& args, int64_t channel, int64_t n,
                      ConvTile& tile) {
  const int width = args.width;
  float flat[kMaxConvWidth * kConvColumns + kWidth];
  to_floats(args.weight.dtype, advanced(args.weight.data, args.weight.dtype, channel * width),
            n * width, flat);
  for (int j = 0; j < width; ++j) {
    for (int64_t c = 0; c < n; ++c) tile.taps[j][c] = flat[c * width + j];
    for (int64_t c = n; c < (n + kWidth - 1) / kWidth * kWidth; ++c) tile.taps[j][c] = 0.0f;
  }
}

// The input at `token` of the item's document, which may lie before its beginning.
static void load_input(const mate_short_conv_args& args, const ConvItem& item, int64_t token,
                       int64_t channel, int64_t n, float* to) {
  if (token >= item.begin) {
    const char* x = row(args.x, item.batch, token, 0);
    return to_floats(args.x.dtype, advanced(x, args.x.dtype, channel), n, to);
  }
  __builtin_memset(to, 0, (n + kWidth - 1) / kWidth * kWidth * sizeof(float));
  if (!args.initial_state.data) return;
  const int64_t size = element_size(args.x.dtype);
  const int64_t tap = args.width + token - item.begin;
  for (int64_t i = 0; i < n; i += kWidth) {
    char raw[4 * kWidth] = {};
    for (int64_t j = 0; j < kWidth && i + j < n; ++j) {
      copy_element(size, row(args.initial_state, item.sequence, channel + i + j, tap),
                   raw + j * size);
    }
    store(to + i, load_as(args.x.dtype, raw, 0));
  }
}

// n tokens from `token` on, whose rows begin at tile.rows[W - 1].
template <int W>
MATE_INLINE void convolve_as(int32_t dtype, const mate_short_conv_args& args, const ConvItem& item,
                             int64_t token, int n, int64_t channel, int64_t columns,
                             const ConvTile& tile) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    Vec taps[W];
    MATE_UNROLL
    for (int j = 0; j < W; ++j) taps[j] = load(tile.taps[j] + c);
    for (int i = 0; i < n; ++i) {
      Vec sum = taps[0] * load(tile.rows[i] + c);
      MATE_UNROLL
      for (int j = 1; j < W; ++j) sum += taps[j] * load(tile.rows[i + j] + c);
      store_some(dtype, row(args.y, item.batch, token + i, 0), channel + c, columns - c, silu(sum));
    }
  }
}

template <int W>
static void convolve(const mate_short_conv_args& args, const ConvItem& item, int64_t token, int n,
                     int64_t channel, int64_t columns, const ConvTile& tile) {
  if (args.y.dtype == MATE_FLOAT32) {
    convolve_as<W>(MATE_FLOAT32, args, item, token, n, channel, columns, tile);
  } else if (args.y.dtype == MATE_BFLOAT16) {
    convolve_as<W>(MATE_BFLOAT16, args, item, token, n, channel, columns, tile);
  } else {
    convolve_as<W>(MATE_FLOAT16, args, item, token, n, channel, columns, tile);
  }
}

// Copies bits: a state holds what the inputs held.
static void store_window(const mate_short_conv_args& args, const ConvItem& item) {
  const int64_t size = element_size(args.x.dtype);
  for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
    for (int j = 0; j < args.width; ++j) {
      const int64_t token = item.end - args.width + j;
      char* to = row(args.final_state, item.sequence, c, j);
      if (token >= item.begin) {
        copy_element(size, row(args.x, item.batch, token, 0) + c * size, to);
      } else if (args.initial_state.data) {
        const int64_t tap = args.width + token - item.begin;
        copy_element(size, row(args.initial_state, item.sequence, c, tap), to);
      } else {
        __builtin_memset(to, 0, size);
      }
    }
  }
}

static void run_short_conv(const mate_short_conv_args& args, const ConvItem& item) {
  using Convolve = void (*)(const mate_short_conv_args&, const ConvItem&, int64_t, int, int64_t,
                            int64_t, const ConvTile&);
  static constexpr Convolve kConvolve[kMaxConvWidth] = {convolve<1>, convolve<2>, convolve<3>,
                                                        convolve<4>, convolve<5>, convolve<6>,
                                                        convolve<7>, convolve<8>};
  const int past = args.width - 1;
  alignas(64) ConvTile tile;
  for (int64_t c = item.channel_begin; c < item.channel_end; c += kConvColumns) {
    if (item.from == item.to) break;
    const int64_t left = item.channel_end - c, n = left < kConvColumns ? left : kConvColumns;
    load_taps(args, c, n, tile);
    for (int i = 0; i < past; ++i) {
      load_input(args, item, item.from - past + i, c, n, tile.rows[i]);
    }
    for (int64_t t = item.from; t < item.to; t += kConvTokens) {
      const int tokens = item.to - t < kConvTokens ? static_cast<int>(item.to - t) : kConvTokens;
      for (int i = 0; i < tokens; ++i) {
        load_input(args, item, t + i, c, n, tile.rows[past + i]);
      }
      kConvolve[past](args, item, t, tokens, c, n, tile);
      for (int i = 0; i < past; ++i) {
        __builtin_memcpy(tile.rows[i], tile.rows[tokens + i], sizeof(tile.rows[i]));
      }
    }
  }
  if (args.final_state.data && item.to == item.end) store_window(args, item);
}

// ---- gated norm ---------------------------------------------------------------------------------

struct NormRow {
  const void *x, *gate;
  void* output;
  int32_t x_dtype, gate_dtype, output_dtype;
};

MATE_INLINE void norm_row(const NormRow& r, const mate_rows& weight, int64_t dim, float eps) {
  Vec squares = {};
  for (int64_t c = 0; c < dim; c += kWidth) {
    const Vec x = load_some(r.x_dtype, r.x, c, dim - c);
    squares += x * x;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
  for (int64_t c = 0; c < dim; c += kWidth) {
    const int64_t n = dim - c;
    const Vec x = load_some(r.x_dtype, r.x, c, n) * scale;
    const Vec w = load_some(weight.dtype, weight.data, c, n);
    store_some(r.output_dtype, r.output, c, n,
               x * w * sigmoid(load_some(r.gate_dtype, r.gate, c, n)));
  }
}

static void run_gated_norm(const mate_gated_norm_args& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % args.size[2], rest = i / args.size[2];
    const int64_t b = rest % args.size[1], a = rest / args.size[1];
    const NormRow r = {row(args.x, a, b, c), row(args.gate, a, b, c), row(args.output, a, b, c),
                       args.x.dtype,         args.gate.dtype,         args.output.dtype};
    norm_row(r, args.weight, args.dim, args.eps);
  }
}

// ---- a decode step ------------------------------------------------------------------------------

MATE_INLINE char* at_row(const mate_rows& x, int64_t row, int64_t element) {
  return static_cast<char*>(x.data) + (row * x.stride + element) * element_size(x.dtype);
}

// What a head's convolution needs: 128 channels of input, weight and window.
struct HeadConv {
  const mate_rows &x, &weight, &state;
  int64_t batch;
  int64_t window;          // the row of its window, -1: zeros, which stay
  int64_t channel;         // of x and weight
  int64_t window_channel;  // of the window, which q, k and v share
};

template <int W>
static void convolve_head(const HeadConv& conv, float* y) {
  alignas(64) float x[kDim], weight[kDim * W], window[kDim * W];
  to_floats(conv.x.dtype, at_row(conv.x, conv.batch, conv.channel), kDim, x);
  to_floats(conv.weight.dtype, at_row(conv.weight, 0, conv.channel * W), kDim * W, weight);
  if (conv.window < 0) {
    __builtin_memset(window, 0, sizeof(window));
  } else {
    to_floats(conv.state.dtype, at_row(conv.state, conv.window, conv.window_channel * W), kDim * W,
              window);
  }
  for (int c = 0; c < kDim; ++c) {
    float sum = weight[c * W + W - 1] * x[c];
    for (int j = 0; j < W - 1; ++j) sum += weight[c * W + j] * window[c * W + j + 1];
    y[c] = sum;
  }
  for (int c = 0; c < kDim; c += kWidth) store(y + c, silu(load(y + c)));
}

static void convolve_head(int width, const HeadConv& conv, float* y) {
  using Convolve = void (*)(const HeadConv&, float*);
  static constexpr Convolve kConvolve[kMaxConvWidth] = {
      convolve_head<1>, convolve_head<2>, convolve_head<3>, convolve_head<4>,
      convolve_head<5>, convolve_head<6>, convolve_head<7>, convolve_head<8>};
  kConvolve[width - 1](conv, y);
}

// The window takes the input in, and its oldest element leaves.
static void advance_head(int width, const HeadConv& conv) {
  if (conv.window < 0) return;
  const int64_t size = element_size(conv.state.dtype);
  char* window = at_row(conv.state, conv.window, conv.window_channel * width);
  const char* x = at_row(conv.x, conv.batch, conv.channel);
  __builtin_memmove(window, window + size, (kDim * width - 1) * size);
  for (int c = 0; c < kDim; ++c) {
    copy_element(size, x + c * size, window + (c * width + width - 1) * size);
  }
}

static HeadConv q_conv(const mate_decode_args& args, const DecodeRow& r, int64_t head_qk) {
  const int64_t channel = head_qk * kDim;
  return {args.q, args.q_weight, args.conv_state, r.batch, r.state, channel, channel};
}
static HeadConv k_conv(const mate_decode_args& args, const DecodeRow& r, int64_t head_qk) {
  const int64_t channel = head_qk * kDim;
  return {args.k,
          args.k_weight,
          args.conv_state,
          r.batch,
          r.state,
          channel,
          args.heads_qk * kDim + channel};
}
static HeadConv v_conv(const mate_decode_args& args, const DecodeRow& r, int64_t head) {
  const int64_t channel = head * kDim, before = 2 * args.heads_qk * kDim;
  return {args.v, args.v_weight, args.conv_state, r.batch, r.state, channel, before + channel};
}

static void advance_qk(const mate_decode_args& args, const DecodeRow& r, int64_t head_qk) {
  advance_head(args.width, q_conv(args, r, head_qk));
  advance_head(args.width, k_conv(args, r, head_qk));
}

// The recurrence is recurrent.h's, on one head's q, k, v and output in local memory.
static void run_decode(const mate_decode_args& args, const DecodeRow& r, int64_t head) {
  const int64_t head_qk = head / (args.heads_v / args.heads_qk);
  alignas(64) float q[kDim], k[kDim], v[kDim], output[kDim];
  alignas(64) float scratch[kTokenFloats + kDim * kMaxWidth];
  convolve_head(args.width, q_conv(args, r, head_qk), q);
  convolve_head(args.width, k_conv(args, r, head_qk), k);
  convolve_head(args.width, v_conv(args, r, head), v);
  advance_head(args.width, v_conv(args, r, head));

  mate_kda_args step = {};
  step.q = {q, {}, MATE_FLOAT32};
  step.k = {k, {}, MATE_FLOAT32};
  step.v = {v, {}, MATE_FLOAT32};
  step.output = {output, {}, MATE_FLOAT32};
  step.g = {args.g.data, {args.g.stride, 0, kDim}, args.g.dtype};
  step.beta = {args.beta.data, {args.beta.stride, 0, 1}, args.beta.dtype};
  step.initial_state = step.final_state = args.state;
  step.A_log = args.A_log;
  step.dt_bias = args.dt_bias;
  step.heads_qk = step.heads_v = args.heads_v;
  step.scale = args.scale;
  step.lower_bound = args.lower_bound;
  step.gate = args.gate;
  step.flags = args.flags;
  const WorkItem item = {r.state, r.batch, 0, 1, head, head + 1, 0, kDim, true};
  run_recurrent(step, item, scratch);

  const int64_t channel = head * kDim;
  const NormRow norm = {output,
                        at_row(args.output_gate, r.batch, channel),
                        at_row(args.output, r.batch, channel),
                        MATE_FLOAT32,
                        args.output_gate.dtype,
                        args.output.dtype};
  norm_row(norm, args.norm_weight, kDim, args.norm_eps);
}

extern const LayerKernels layer_kernels;
const LayerKernels layer_kernels = {run_short_conv, run_gated_norm, run_decode, advance_qk};

}  // namespace MATE_ISA
}  // namespace mate
