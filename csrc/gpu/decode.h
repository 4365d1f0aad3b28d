// A decode step of a whole inner layer: short convolutions, SiLU, l2 norm, gate, recurrence and
// gated norm of one token a sequence, in one kernel.
//
// A block takes one sequence and value head, all 128 rows of whose state it holds in registers: the
// norm needs nothing from other blocks. The state is asked for before anything else. Windows of q
// and k belong to several blocks where value heads share them; then a second kernel moves them on.
#pragma once

#include "recurrent.h"

namespace mate {
namespace gpu {

constexpr int kDecodeRows = 4, kDecodeWarps = kDim / (4 * kDecodeRows);
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kMaxConvWidth = MATE_MAX_CONV_WIDTH;

struct DecodeParams {
  mate_decode_args args;
  uint32_t group;  // value heads to a query head
  bool state_aligned;
};

struct DecodeShared {
  Token token;
  float squares[kDecodeWarps];  // of the output, each warp's rows
};

MATE_DEVICE char* element_at(const mate_rows& x, int64_t row, int64_t element) {
  return static_cast<char*>(x.data) + (row * x.stride + element) * element_size(x.dtype);
}

MATE_DEVICE float silu(float x) { return x * careful_sigmoid(x); }

MATE_DEVICE int64_t decode_index(const mate_decode_args& a, int64_t n) {
  return state_index(a.state_indices, a.state_indices_is_64bit, a.num_states, n);
}

// ---- convolutions -------------------------------------------------------------------------------

// Of one channel as memory holds it: the window, oldest input first, the input that it takes in,
// and the weight.
struct Channel {
  char* window;
  bool present;
  uint32_t bits[kMaxConvWidth], input, taps[kMaxConvWidth];
};

MATE_DEVICE void store_bits(char* p, int i, int32_t dtype, uint32_t bits) {
  if (dtype == MATE_FLOAT32) {
    reinterpret_cast<uint32_t*>(p)[i] = bits;
  } else {
    reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
  }
}

// `channel` counts within x, `window_channel` within the window that q, k and v share.
MATE_DEVICE Channel load_channel(const mate_decode_args& a, const mate_rows& x, int64_t n,
                                 int64_t index, int channel, int window_channel) {
  Channel c = {};
  c.window =
      element_at(a.conv_state, larger(index, 0), static_cast<int64_t>(window_channel) * a.width);
  c.present = index >= 0;
  c.input = load_bits(element_at(x, n, channel), 0, x.dtype);
  MATE_UNROLL
  for (int j = 0; j < kMaxConvWidth; ++j) {
    if (c.present && j < a.width) c.bits[j] = load_bits(c.window, j, a.conv_state.dtype);
  }
  return c;
}

MATE_DEVICE void load_taps(const mate_decode_args& a, const mate_rows& weight, int channel,
                           Channel& c) {
  const char* from = element_at(weight, 0, static_cast<int64_t>(channel) * a.width);
  MATE_UNROLL
  for (int j = 0; j < kMaxConvWidth; ++j) {
    if (j < a.width) c.taps[j] = load_bits(from, j, weight.dtype);
  }
}

// What the j-th place of the window is to hold.
MATE_DEVICE uint32_t moved(const mate_decode_args& a, const Channel& c, int j) {
  return j + 1 < a.width ? c.bits[(j + 1) % kMaxConvWidth] : c.input;
}

MATE_DEVICE float convolve(const mate_decode_args& a, const Channel& c, int32_t weight_dtype) {
  float sum = 0.0f;
  MATE_UNROLL
  for (int j = 0; j < kMaxConvWidth; ++j) {
    if (j >= a.width) break;
    sum += to_float(c.taps[j], weight_dtype) * to_float(moved(a, c, j), a.conv_state.dtype);
  }
  return silu(sum);
}

MATE_DEVICE void advance(const mate_decode_args& a, const Channel& c) {
  if (!c.present) return;
  MATE_UNROLL
  for (int j = 0; j < kMaxConvWidth; ++j) {
    if (j < a.width) store_bits(c.window, j, a.conv_state.dtype, moved(a, c, j));
  }
}

// Field by field: a reference to one of several parameters would put all into local memory.
MATE_DEVICE mate_rows choose(bool first, const mate_rows& x, const mate_rows& y) {
  return {first ? x.data : y.data, first ? x.stride : y.stride, first ? x.dtype : y.dtype};
}

constexpr int kAdvanceThreads = 256;

// A thread a channel of q and k, of every sequence.
MATE_KERNEL(kAdvanceThreads, 4) advance_windows(const DecodeParams p) {
  const mate_decode_args& a = p.args;
  const int64_t keys = a.heads_qk * kDim, i = block_index() * kAdvanceThreads + thread_index();
  const int64_t n = i / (2 * keys);
  if (n >= a.batch) return;
  const int channel = static_cast<int>(i - n * 2 * keys), is_k = channel >= keys;
  const int within = channel - is_k * static_cast<int>(keys);
  advance(a, load_channel(a, choose(is_k, a.k, a.q), n, decode_index(a, n), within, channel));
}

// ---- the kernel ---------------------------------------------------------------------------------

// q, k and v behind their convolutions and the decay, to shared memory: a thread a channel of q and
// of v, or of k and of the gate. All is asked for before anything is used or written.
MATE_DEVICE void prepare_step(const DecodeParams& p, int64_t n, int64_t index, int head,
                              Token& token) {
  const mate_decode_args& a = p.args;
  static_assert(kDecodeThreads == 2 * kDim, "a thread two channels");
  const bool first = thread_index() < kDim;
  const int c = thread_index() % kDim, keys = static_cast<int>(a.heads_qk) * kDim;
  const int own = head * kDim + c, shared = p.group == 1 ? own : head / p.group * kDim + c;

  const mate_rows weight = choose(first, a.q_weight, a.k_weight);
  Channel qk =
      load_channel(a, choose(first, a.q, a.k), n, index, shared, first ? shared : keys + shared);
  load_taps(a, weight, shared, qk);
  Channel v = {};
  float g = 0.0f, bias = 0.0f;
  if (first) {
    v = load_channel(a, a.v, n, index, own, 2 * keys + own);
    load_taps(a, a.v_weight, own, v);
  } else {
    g = load_element(element_at(a.g, n, own), 0, a.g.dtype);
    if (a.gate != MATE_GATE_LOG_DECAY) bias = a.dt_bias[own];
  }
  const TokenGate gate(a.gate, a.A_log, a.lower_bound, head);

  (first ? token.q : token.k)[c] = convolve(a, qk, weight.dtype);
  if (first) {
    token.v[c] = convolve(a, v, a.v_weight.dtype);
    advance(a, v);
  } else {
    const Decay d = gate.decay(g, bias);
    token.whole[c] = d.whole;
    token.part[c] = d.part;
  }
  if (p.group == 1) advance(a, qk);
}

MATE_DEVICE float warp_sum(float x) {
  MATE_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

template <int32_t kDtype, bool kValueFirst>
MATE_KERNEL(kDecodeThreads, 2)
decode(const DecodeParams p) {
  using Rows = StateRows<kDtype, kDecodeRows, kValueFirst>;
  const mate_decode_args& a = p.args;
  DecodeShared& shared = *reinterpret_cast<DecodeShared*>(shared_memory());
  const uint32_t block = static_cast<uint32_t>(block_index()), heads = a.heads_v;
  const uint32_t n = block / heads, head = block - n * heads;
  const int warp = thread_index() / 32, row = warp * 4 * kDecodeRows;

  const int64_t index = decode_index(a, n);
  const StatePlace place = place_of_state(a.state, index, head, p.state_aligned);
  const auto raw = Rows::load(place, row);  // before anything is waited for

  let_next_begin();
  wait_for_before();
  prepare_step(p, n, index, head, shared.token);
  // of the element of the output that this thread will write
  const int value = Rows::first_row(row) + row_lane() % kDecodeRows;
  const int64_t at = static_cast<int64_t>(head) * kDim + value;
  const float opened = load_element(element_at(a.output_gate, n, at), 0, a.output_gate.dtype);
  const float norm_weight = load_element(a.norm_weight.data, value, a.norm_weight.dtype);
  const float beta = load_element(element_at(a.beta, n, head), 0, a.beta.dtype);
  MATE_BARRIER();

  const Four q = load_four(shared.token.q + lane_index() * 4);
  const Four k = load_four(shared.token.k + lane_index() * 4);
  const TokenScales scales =
      find_scales(dot(q, q), dot(k, k), dot(q, k), writing_strength(beta, a.flags), a.scale,
                  a.flags & MATE_L2NORM);
  Rows state;
  state.take(raw);
  float output[kDecodeRows];
  step(state, shared.token, scales, row, output);
  state.store(place, row);

  const bool writes = row_lane() < kDecodeRows;
  const float o = pick(output), square = warp_sum(writes ? o * o : 0.0f);
  if (lane_index() == 0) shared.squares[warp] = square;
  MATE_BARRIER();
  float squares = 0.0f;
  MATE_UNROLL
  for (int w = 0; w < kDecodeWarps; ++w) squares += shared.squares[w];
  if (writes) {
    const float normed = o * fast_rsqrt(squares / kDim + a.norm_eps) * norm_weight;
    store_element(element_at(a.output, n, at), 0, a.output.dtype, normed * careful_sigmoid(opened));
  }
}

// ---- launching ----------------------------------------------------------------------------------

inline bool serves_decode(const mate_decode_args& a) {
  const auto inputs = [&](const mate_rows& x) { return x.dtype == a.conv_state.dtype; };
  const auto known = [](const mate_rows& x) { return known_dtype(x.dtype); };
  return known_dtype(a.state.dtype) && inputs(a.q) && inputs(a.k) && inputs(a.v) &&
         known(a.conv_state) && known(a.g) && known(a.beta) && known(a.output_gate) &&
         known(a.output) && known(a.q_weight) && known(a.k_weight) && known(a.v_weight) &&
         known(a.norm_weight) && a.width >= 1 && a.width <= kMaxConvWidth &&
         a.gate >= MATE_GATE_LOG_DECAY && a.gate <= MATE_GATE_SOFTPLUS &&
         (a.gate == MATE_GATE_LOG_DECAY || (a.A_log && a.dt_bias)) && a.heads_qk > 0 &&
         a.heads_v > 0 && a.heads_v % a.heads_qk == 0 && a.batch >= 0 &&
         a.batch <= INT32_MAX / (4 * kDim * a.heads_v);
}

template <int32_t kDtype>
bool launch_decode(const DecodeParams& p, bool early, void* stream) {
  const auto kernel =
      p.args.flags & MATE_STATE_V_FIRST ? decode<kDtype, true> : decode<kDtype, false>;
  return launch(kernel, p.args.batch * p.args.heads_v, kDecodeThreads,
                static_cast<int>(sizeof(DecodeShared)), stream, p, early);
}

// `early`: behind a launch that may have written the rows, but neither states nor their indices.
inline int32_t run_decode(const mate_decode_args& args, void* stream, bool early = false) {
  if (!serves_decode(args)) return MATE_UNSUPPORTED;
  if (args.batch == 0) return MATE_OK;
  DecodeParams p = {};
  p.args = args;
  p.group = static_cast<uint32_t>(args.heads_v / args.heads_qk);
  const int64_t states = args.state_indices ? args.num_states : args.batch;
  p.state_aligned = rows_aligned(args.state, states, args.heads_v, kDim);
  const int32_t dtype = args.state.dtype;
  bool launched = dtype == MATE_FLOAT32   ? launch_decode<MATE_FLOAT32>(p, early, stream)
                  : dtype == MATE_FLOAT16 ? launch_decode<MATE_FLOAT16>(p, early, stream)
                                          : launch_decode<MATE_BFLOAT16>(p, early, stream);
  if (launched && p.group > 1) {
    const int64_t channels = args.batch * 2 * args.heads_qk * kDim;
    launched = launch(advance_windows, (channels + kAdvanceThreads - 1) / kAdvanceThreads,
                      kAdvanceThreads, 0, stream, p);
  }
  if (!launched) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int32_t mate_gpu_decode_step(const mate_decode_args* args, void* stream) {
  return mate::gpu::run_decode(*args, stream);
}
