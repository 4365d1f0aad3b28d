// The recurrence token by token, for short sequences: decode, speculative verification.
//
// A block takes some value rows of one sequence and head, and keeps them in registers for all
// tokens (state_rows.h): the state is read once and written once. Its warps prepare a token each
// (norms, gate, decay) in shared memory, and all go through these tokens; the inputs of the next
// ones are fetched before. Which blocks there are depends on shapes alone; where a sequence begins
// and ends is read from cu_seqlens by each block.
#pragma once

#include "token.h"

namespace mate {
namespace gpu {

constexpr int kRecurrentWarps = 4;  // at most; of a block

struct RecurrentParams {
  mate_kda_args args;
  int slice_bits;                                   // log2 of the blocks to a head
  uint32_t group;                                   // value heads to a query head
  bool q_aligned, k_aligned, v_aligned, g_aligned;  // every row starts at a multiple of 16 bytes
  bool initial_aligned, final_aligned, token_states_aligned;
};

struct PreparedToken {
  Token token;
  TokenScales scales;
};

// ---- tokens -------------------------------------------------------------------------------------

// Four channels as memory holds them: fp32, or 16 bits in the first two words.
struct RawFour {
  uint32_t x[4];
};

MATE_DEVICE RawFour load_raw(const char* row, int channel, int32_t dtype, bool aligned) {
  RawFour raw = {};
  if (dtype == MATE_FLOAT32) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + channel;
    if (aligned) {
      const Eight x = *reinterpret_cast<const Eight*>(from);
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) raw.x[i] = x.x[i];
    } else {
      MATE_UNROLL
      for (int i = 0; i < 4; ++i) raw.x[i] = from[i];
    }
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + channel;
    if (aligned) {
      const PackedFour x = load_packed(from);
      raw.x[0] = x.x[0];
      raw.x[1] = x.x[1];
    } else {
      MATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        raw.x[i] = from[2 * i] | static_cast<uint32_t>(from[2 * i + 1]) << 16;
      }
    }
  }
  return raw;
}

MATE_DEVICE Four to_floats(const RawFour& raw, int32_t dtype) {
  if (dtype == MATE_FLOAT32) {
    return {{from_bits(raw.x[0]), from_bits(raw.x[1]), from_bits(raw.x[2]), from_bits(raw.x[3])}};
  }
  const bool fp16 = dtype == MATE_FLOAT16;
  const Pair a = fp16 ? unpack<MATE_FLOAT16>(raw.x[0]) : unpack<MATE_BFLOAT16>(raw.x[0]);
  const Pair b = fp16 ? unpack<MATE_FLOAT16>(raw.x[1]) : unpack<MATE_BFLOAT16>(raw.x[1]);
  return {{a.x, a.y, b.x, b.y}};
}

// What a warp fetches of a token, a lane four channels.
struct TokenInputs {
  RawFour q, k, v, g;
  float beta;
};

struct RecurrentItem {
  int64_t batch, head, head_qk, begin, end;  // tokens
};

MATE_DEVICE TokenInputs fetch_token(const RecurrentParams& p, const RecurrentItem& item,
                                    int64_t token) {
  const mate_kda_args& a = p.args;
  const int channel = lane_index() * 4;
  TokenInputs x;
  x.q = load_raw(row_at(a.q, item.batch, token, item.head_qk), channel, a.q.dtype, p.q_aligned);
  x.k = load_raw(row_at(a.k, item.batch, token, item.head_qk), channel, a.k.dtype, p.k_aligned);
  x.g = load_raw(row_at(a.g, item.batch, token, item.head), channel, a.g.dtype, p.g_aligned);
  x.v = load_raw(row_at(a.v, item.batch, token, item.head), channel, a.v.dtype, p.v_aligned);
  x.beta = load_element(row_at(a.beta, item.batch, token, item.head), 0, a.beta.dtype);
  return x;
}

MATE_DEVICE float dot(const Four& a, const Four& b) {
  return a.x[0] * b.x[0] + a.x[1] * b.x[1] + a.x[2] * b.x[2] + a.x[3] * b.x[3];
}

MATE_DEVICE void prepare_token(const RecurrentParams& p, const TokenGate& gate, const Four& bias,
                               const TokenInputs& x, PreparedToken& to) {
  const mate_kda_args& a = p.args;
  const int channel = lane_index() * 4;
  const Four q = to_floats(x.q, a.q.dtype), k = to_floats(x.k, a.k.dtype);
  const Four g = to_floats(x.g, a.g.dtype);
  store_four(to.token.q + channel, q);
  store_four(to.token.k + channel, k);
  store_four(to.token.v + channel, to_floats(x.v, a.v.dtype));
  const float beta = writing_strength(x.beta, a.flags);
  const TokenScales scales =
      find_scales(dot(q, q), dot(k, k), dot(q, k), beta, a.scale, a.flags & MATE_L2NORM);
  if (lane_index() == 0) to.scales = scales;
  Four whole, part;
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Decay d = gate.decay(g.x[i], bias.x[i]);
    whole.x[i] = d.whole;
    part.x[i] = d.part;
  }
  store_four(to.token.whole + channel, whole);
  store_four(to.token.part + channel, part);
}

// ---- the kernel ---------------------------------------------------------------------------------

MATE_DEVICE StatePlace place_of_state(const mate_tensor& x, int64_t index, int64_t head,
                                      bool aligned) {
  return {row_at(x, larger(index, 0), head, 0), x.stride[2], x.data && index >= 0, aligned};
}

template <int32_t kDtype, int kRows, bool kValueFirst>
MATE_KERNEL(kRecurrentWarps * 32, kRows == 1 ? 4 : 3)
recurrent(const RecurrentParams p) {
  using Rows = StateRows<kDtype, kRows, kValueFirst>;
  const mate_kda_args& a = p.args;
  PreparedToken* prepared = reinterpret_cast<PreparedToken*>(shared_memory());
  const uint32_t block = static_cast<uint32_t>(block_index()), heads = a.heads_v;
  const uint32_t slice = block & ((1u << p.slice_bits) - 1), n = (block >> p.slice_bits) / heads;
  const uint32_t head = (block >> p.slice_bits) - n * heads;
  const int warp = thread_index() / 32, warps = kDim / (4 * kRows) >> p.slice_bits;
  const int row = (slice * warps + warp) * 4 * kRows;  // the warp's first

  const int64_t index = state_index(a.state_indices, a.state_indices_is_64bit, a.num_states, n);
  const StatePlace initial = place_of_state(a.initial_state, index, head, p.initial_aligned);
  const auto raw = Rows::load(initial, row);  // before anything is waited for

  RecurrentItem item = {n, head, p.group == 1 ? head : head / p.group, 0, a.seq_len};
  if (a.cu_seqlens) {
    item.batch = 0;
    item.begin = clamped_bound(a, n);
    item.end = larger(item.begin, clamped_bound(a, n + 1));
  }
  TokenInputs next = {};
  if (item.begin + warp < item.end) next = fetch_token(p, item, item.begin + warp);
  const TokenGate gate(a.gate, a.A_log, a.lower_bound, head);
  Four bias = {};
  if (a.gate != MATE_GATE_LOG_DECAY) {
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) bias.x[i] = a.dt_bias[head * kDim + lane_index() * 4 + i];
  }

  PreparedToken* turn = prepared;  // two take turns if there are more tokens than warps
  if (item.begin + warp < item.end) prepare_token(p, gate, bias, next, turn[warp]);
  MATE_BARRIER();
  Rows state;
  state.take(raw);
  MATE_NO_UNROLL
  for (int64_t first = item.begin; first < item.end; first += warps) {
    const int64_t after = first + warps;
    if (after + warp < item.end) next = fetch_token(p, item, after + warp);
    const int count = static_cast<int>(after < item.end ? warps : item.end - first);
    MATE_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      float output[kRows];
      step(state, turn[i].token, turn[i].scales, row, output);
      const float mine = pick(output);
      if (row_lane() < kRows) {
        char* to = row_at(a.output, item.batch, first + i, head);
        store_element(to, Rows::first_row(row) + row_lane(), a.output.dtype, mine);
      }
      if (a.token_states.data) {
        char* to = row_at(a.token_states, item.batch, first + i, head);
        state.store({to, kDim, true, p.token_states_aligned}, row);
      }
    }
    if (after >= item.end) break;
    turn = turn == prepared ? prepared + warps : prepared;
    if (after + warp < item.end) prepare_token(p, gate, bias, next, turn[warp]);
    MATE_BARRIER();
  }
  state.store(place_of_state(a.final_state, index, head, p.final_aligned), row);
}

// ---- launching ----------------------------------------------------------------------------------

// Of all states of a call, which are alike.
inline int32_t state_dtype(const mate_kda_args& args) {
  return args.initial_state.data  ? args.initial_state.dtype
         : args.final_state.data  ? args.final_state.dtype
         : args.token_states.data ? args.token_states.dtype
                                  : MATE_FLOAT32;
}

inline bool serves_recurrent(const mate_kda_args& args) {
  const auto either = [&](const mate_tensor& x) {
    return x.dtype == args.q.dtype || x.dtype == MATE_FLOAT32;
  };
  const auto state = [&](const mate_tensor& x) {
    return !x.data || (known_dtype(x.dtype) && x.dtype == state_dtype(args));
  };
  return known_dtype(args.q.dtype) && args.k.dtype == args.q.dtype &&
         args.v.dtype == args.q.dtype && args.output.dtype == args.q.dtype && either(args.g) &&
         either(args.beta) && state(args.initial_state) && state(args.final_state) &&
         state(args.token_states) && args.gate >= MATE_GATE_LOG_DECAY &&
         args.gate <= MATE_GATE_SOFTPLUS &&
         (args.gate == MATE_GATE_LOG_DECAY || (args.A_log && args.dt_bias)) && args.num_seqs >= 0 &&
         args.seq_len >= 0 && args.total_tokens >= 0 && args.heads_qk > 0 && args.heads_v >= 0 &&
         args.heads_v % args.heads_qk == 0 && args.num_states >= 0;
}

// Few large blocks run at the rate of a copy; many small ones have the whole GPU read a small
// state.
template <int32_t kDtype, int kRows, bool kValueFirst>
bool launch_recurrent(RecurrentParams& p, int warps, void* stream) {
  const mate_kda_args& args = p.args;
  const int64_t longest = args.cu_seqlens ? args.total_tokens : args.seq_len;
  const int slices = kDim / (4 * kRows * warps);
  for (p.slice_bits = 0; 1 << p.slice_bits < slices;) ++p.slice_bits;
  const int tokens = longest > warps ? 2 * warps : warps;
  const int64_t heads = args.num_seqs * args.heads_v;
  return launch(recurrent<kDtype, kRows, kValueFirst>, heads * slices, warps * 32,
                tokens * static_cast<int>(sizeof(PreparedToken)), stream, p);
}

template <int32_t kDtype>
bool launch_recurrent(RecurrentParams& p, void* stream) {
  const int64_t heads = p.args.num_seqs * p.args.heads_v;
  const bool many = heads >= multiprocessors();
  if (!(p.args.flags & MATE_STATE_V_FIRST)) {
    return launch_recurrent<kDtype, 4, false>(p, many ? 4 : 2, stream);
  }
#if defined(MATE_GPU_RECURRENT_ROWS)
  return launch_recurrent<kDtype, MATE_GPU_RECURRENT_ROWS, true>(p, 4, stream);
#else
  return many ? launch_recurrent<kDtype, 4, true>(p, 4, stream)
              : launch_recurrent<kDtype, 1, true>(p, 4, stream);
#endif
}

inline int32_t run_recurrent(const mate_kda_args& args, void* stream) {
  if (!serves_recurrent(args)) return MATE_UNSUPPORTED;
  if (args.num_seqs == 0 || args.heads_v == 0) return MATE_OK;
  if (args.num_seqs > INT32_MAX / (8 * args.heads_v)) return MATE_UNSUPPORTED;
  RecurrentParams p = {};
  p.args = args;
  p.group = static_cast<uint32_t>(args.heads_v / args.heads_qk);
  const int64_t batch = args.cu_seqlens ? 1 : args.num_seqs, tokens = args.total_tokens;
  p.q_aligned = rows_aligned(args.q, batch, tokens, args.heads_qk);
  p.k_aligned = rows_aligned(args.k, batch, tokens, args.heads_qk);
  p.v_aligned = rows_aligned(args.v, batch, tokens, args.heads_v);
  p.g_aligned = rows_aligned(args.g, batch, tokens, args.heads_v);
  const int64_t states = args.state_indices ? args.num_states : args.num_seqs;
  p.initial_aligned = rows_aligned(args.initial_state, states, args.heads_v, kDim);
  p.final_aligned = rows_aligned(args.final_state, states, args.heads_v, kDim);
  p.token_states_aligned = rows_aligned(args.token_states, batch, tokens, args.heads_v);
  const int32_t dtype = state_dtype(args);
  const bool launched = dtype == MATE_FLOAT32   ? launch_recurrent<MATE_FLOAT32>(p, stream)
                        : dtype == MATE_FLOAT16 ? launch_recurrent<MATE_FLOAT16>(p, stream)
                                                : launch_recurrent<MATE_BFLOAT16>(p, stream);
  if (!launched) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

}  // namespace gpu
}  // namespace mate
