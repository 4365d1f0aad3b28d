// The recurrence over chunks: a block a (sequence, value head, slice of value channels).
//
// Everything is transposed: a warp owns 16 value channels, and the rows of its accumulators are
// these. Its slice of the state stays in registers in fp32 for the whole sequence, and each
// product's result is the next one's left operand: warps never wait for one another's numbers, only
// for the chunk's operands. These lie in shared memory once; each part is refilled for the next
// chunk as soon as it has been read.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

template <int kSlice>
struct ScanShared {
  static constexpr int kThreads = kSlice / kBlock * 32;
  uint16_t k_in[kChunk * kDim], q_in[kChunk * kDim];
  uint16_t k_out[kChunk * kDim];
  uint16_t T_high[kLowerTiles * kTile], T_low[kLowerTiles * kTile], P[kLowerTiles * kTile];
  uint16_t values[kChunk * kSlice];  // v, then the output
  float decay[kDim];
  uint16_t scratch[kSlice / kBlock * kScratch + 8];
};

// ---- copies -------------------------------------------------------------------------------------

template <int kThreads>
MATE_DEVICE void copy_rows(uint16_t* to, const uint16_t* from) {
  for (int i = thread_index(); i < kChunk * kDim / 8; i += kThreads) {
    copy_async(to + i * 8, from + i * 8);
  }
}

template <int kThreads>
MATE_DEVICE void copy_lower(uint16_t* to, const uint16_t* from) {
  for (int i = thread_index(); i < kLowerTiles * kTile / 8; i += kThreads) {
    copy_async(to + i * 8, from + i * 8);
  }
}

// The slice's columns of v from the first token on; absent ones are zeros.
template <int kSlice>
MATE_DEVICE void copy_values(const Params& p, const uint16_t* first, int tokens, uint16_t* values) {
  constexpr int kPieces = kSlice / 8;
  for (int i = thread_index(); i < kChunk * kPieces; i += ScanShared<kSlice>::kThreads) {
    const int row = i / kPieces, at = i % kPieces * 8;
    const bool present = row < tokens;
    const uint16_t* v = first + (present ? row * p.args.v.stride[1] + at : 0);
    uint16_t* to = Tile<kSlice>{values}.at(row, at);
    if (p.v_aligned) {
      copy_async(to, v, present);
    } else {
      Eight x = {};
      if (present) x = load_eight(v, 0, false);
      *reinterpret_cast<Eight*>(to) = x;
    }
  }
}

// ---- state --------------------------------------------------------------------------------------

// Transposed: rows are a warp's value channels, columns key channels.
struct State {
  FragC tile[kKeyTiles];
};

// {row of the tensor, column} of value channel `row` and key channel `column`
MATE_DEVICE char* state_row(const Params& p, const mate_tensor& x, int64_t sequence, int64_t head,
                            int value, int key, int& column) {
  const bool v_first = p.args.flags & MATE_STATE_V_FIRST;
  column = v_first ? key : value;
  return row_at(x, sequence, head, v_first ? value : key);
}

template <class Element>
MATE_DEVICE void each_element(const Element& element, int value) {
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) element(t, v, value + row_of(v), t * kBlock + column_of(v));
  }
}

MATE_DEVICE void load_state(const Params& p, const Sequence& sequence, int64_t head, int value,
                            State& s) {
  const mate_tensor& initial = p.args.initial_state;
  if (sequence.first_chunk < p.slab_begin) {  // began in an earlier slab
    const float* carry = p.carry_in + head * kDim * kDim;
    each_element([&](int t, int v, int row, int key) { s.tile[t].x[v] = carry[row * kDim + key]; },
                 value);
  } else if (initial.data) {
    each_element(
        [&](int t, int v, int row, int key) {
          int column;
          const char* from = state_row(p, initial, sequence.index, head, row, key, column);
          s.tile[t].x[v] = load_element(from, column, initial.dtype);
        },
        value);
  } else {
    each_element([&](int t, int v, int, int) { s.tile[t].x[v] = 0.0f; }, value);
  }
}

MATE_DEVICE void store_state(const Params& p, const Sequence& sequence, int64_t head, int value,
                             const State& s) {
  const mate_tensor& final_state = p.args.final_state;
  const bool begun = sequence.first_chunk < p.slab_end;  // empty ones may lie far beyond
  if (begun && sequence.end_chunk > p.slab_end) {
    float* carry = p.carry_out + head * kDim * kDim;
    each_element([&](int t, int v, int row, int key) { carry[row * kDim + key] = s.tile[t].x[v]; },
                 value);
  } else if (final_state.data) {
    each_element(
        [&](int t, int v, int row, int key) {
          int column;
          char* to = state_row(p, final_state, sequence.index, head, row, key, column);
          store_element(to, column, final_state.dtype, s.tile[t].x[v]);
        },
        value);
  }
}

// ---- one chunk ----------------------------------------------------------------------------------

// What a warp needs of its block.
template <int kSlice>
struct Warp {
  ScanShared<kSlice>& shared;
  int channel;  // its first in the slice
  uint16_t* scratch;
};

// V'^T = (V^T - S^T k_in^T) T^T
template <int32_t kDtype, int kSlice>
MATE_DEVICE void correct(const Warp<kSlice>& warp, const FragA (&state)[kKeyTiles],
                         FragA (&corrected)[kTokenTiles], FragA (&rest)[kTokenTiles]) {
  const Tile<kDim> k_in{warp.shared.k_in};
  const Tile<kSlice> values{warp.shared.values};
  FragA error[kTokenTiles];
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    FragC c = {};
    MATE_UNROLL
    for (int k = 0; k < kKeyTiles; ++k) {
      multiply(c, state[k], load_b_columns(k_in, t * kBlock, k * kBlock));
    }
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) {
      const uint16_t x = *values.at(t * kBlock + column_of(v), warp.channel + row_of(v));
      c.x[v] = from_16_bits<kDtype>(x) - c.x[v];
    }
    error[t] = to_operand(c, warp.scratch);
  }
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    FragC c = {};
    MATE_UNROLL
    for (int m = 0; m <= t; ++m) {
      multiply(c, error[m], load_b_columns(lower_tile(warp.shared.T_low, t, m), 0, 0));
      multiply(c, error[m], load_b_columns(lower_tile(warp.shared.T_high, t, m), 0, 0));
    }
    corrected[t] = to_operand(c, warp.scratch);
    for (int v = 0; v < 8; ++v) c.x[v] -= from_bits(uint32_t{to_bf16(c.x[v])} << 16);
    rest[t] = to_operand(c, warp.scratch);
  }
}

// O^T = S^T q_in^T + V'^T P^T, to where v was.
template <int32_t kDtype, int kSlice>
MATE_DEVICE void make_output(const Warp<kSlice>& warp, const FragA (&state)[kKeyTiles],
                             const FragA (&corrected)[kTokenTiles]) {
  const Tile<kDim> q_in{warp.shared.q_in};
  const Tile<kSlice> values{warp.shared.values};
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    FragC c = {};
    MATE_UNROLL
    for (int k = 0; k < kKeyTiles; ++k) {
      multiply(c, state[k], load_b_columns(q_in, t * kBlock, k * kBlock));
    }
    MATE_UNROLL
    for (int m = 0; m <= t; ++m) {
      multiply(c, corrected[m], load_b_columns(lower_tile(warp.shared.P, t, m), 0, 0));
    }
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) {
      *values.at(t * kBlock + column_of(v), warp.channel + row_of(v)) = to_16_bits<kDtype>(c.x[v]);
    }
  }
}

// A warp's 16 channels of the output, from the slice's first token on: two lanes a token.
template <int kSlice>
MATE_DEVICE void store_output(const Params& p, const Warp<kSlice>& warp, uint16_t* first,
                              int tokens) {
  const int channel = warp.channel + lane_index() % 2 * 8;
  for (int i = lane_index() / 2; i < tokens; i += 16) {
    const Eight x =
        *reinterpret_cast<const Eight*>(Tile<kSlice>{warp.shared.values}.at(i, channel));
    store_eight(first + i * p.args.output.stride[1], channel, p.output_aligned, x);
  }
}

// S^T <- S^T Diag(decay) + V'^T k_out
template <int kSlice>
MATE_DEVICE void update_state(const Warp<kSlice>& warp, const FragA (&corrected)[kTokenTiles],
                              const FragA (&rest)[kTokenTiles], State& s) {
  const Tile<kDim> k_out{warp.shared.k_out};
  MATE_UNROLL
  for (int k = 0; k < kKeyTiles; ++k) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) s.tile[k].x[v] *= warp.shared.decay[k * kBlock + column_of(v)];
    MATE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      const FragB b = load_b_rows(k_out, t * kBlock, k * kBlock);
      multiply(s.tile[k], rest[t], b);
      multiply(s.tile[k], corrected[t], b);
    }
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

template <int32_t kDtype, int kSlice>
MATE_KERNEL(kSlice / kBlock * 32, 1)
scan(const Params p) {
  constexpr int kThreads = ScanShared<kSlice>::kThreads, kSlices = kDim / kSlice;
  ScanShared<kSlice>& shared = *reinterpret_cast<ScanShared<kSlice>*>(shared_memory());
  const int64_t head = block_index() / kSlices % p.args.heads_v;
  const int64_t n = block_index() / kSlices / p.args.heads_v;
  const int column = static_cast<int>(block_index() % kSlices) * kSlice;
  const int index = thread_index() / 32;
  const Warp<kSlice> warp = {shared, index * kBlock, shared.scratch + index * kScratch};

  // What is left of the sequence in this slab, from the current chunk on.
  const Operands* operands;
  const uint16_t* v;
  uint16_t* output;
  int64_t tokens, chunks;
  {
    const Sequence sequence = sequence_at(p, n);
    const bool empty = sequence.first_chunk == sequence.end_chunk;
    const int64_t begin = sequence.first_chunk > p.slab_begin ? sequence.first_chunk : p.slab_begin;
    chunks = (sequence.end_chunk < p.slab_end ? sequence.end_chunk : p.slab_end) - begin;
    // An empty sequence keeps its state; the first slab's launch sees to it.
    if (chunks <= 0 && !(empty && p.slab_begin == 0)) return;
    const int64_t token = sequence.begin + (begin - sequence.first_chunk) * kChunk;
    tokens = sequence.end - token;
    operands = p.operands + (begin - p.slab_begin) * p.args.heads_v + head;
    v = reinterpret_cast<uint16_t*>(row_at(p.args.v, sequence.batch, token, head)) + column;
    output =
        reinterpret_cast<uint16_t*>(row_at(p.args.output, sequence.batch, token, head)) + column;
  }

  // Each is one group of copies, empty beyond the last chunk, so that waits can count groups.
  const auto copy_k_in = [&](const Operands& from, bool present) {
    if (present) {
      copy_rows<kThreads>(shared.k_in, from.k_in);
      copy_lower<kThreads>(shared.T_high, from.T_high);
      copy_lower<kThreads>(shared.T_low, from.T_low);
    }
    copy_commit();
  };
  const auto copy_v = [&](const uint16_t* from, int64_t left) {
    const int count = static_cast<int>(left < kChunk ? left : kChunk);
    if (left > 0) copy_values<kSlice>(p, from, count, shared.values);
    copy_commit();
  };
  const auto copy_q_in = [&](const Operands& from, bool present) {
    if (present) {
      copy_rows<kThreads>(shared.q_in, from.q_in);
      copy_lower<kThreads>(shared.P, from.P);
    }
    copy_commit();
  };
  const auto copy_k_out = [&](const Operands& from) {
    copy_rows<kThreads>(shared.k_out, from.k_out);
    for (int i = thread_index(); i < kDim / 4; i += kThreads) {
      copy_async(shared.decay + i * 4, from.decay + i * 4);
    }
    copy_commit();
  };

  copy_k_in(*operands, chunks > 0);
  copy_v(v, chunks > 0 ? tokens : 0);
  copy_q_in(*operands, chunks > 0);
  State s;
  load_state(p, sequence_at(p, n), head, column + warp.channel, s);
  for (; chunks > 0; --chunks) {
    const Operands& next = operands[p.args.heads_v];
    const bool more = chunks > 1;
    FragA state[kKeyTiles], corrected[kTokenTiles], rest[kTokenTiles];
    MATE_UNROLL
    for (int k = 0; k < kKeyTiles; ++k) state[k] = to_operand(s.tile[k], warp.scratch);

    copy_wait<1>();  // all but q_in's
    MATE_BARRIER();
    copy_k_out(*operands);
    correct<kDtype>(warp, state, corrected, rest);

    copy_wait<1>();  // all but k_out's
    MATE_BARRIER();
    copy_k_in(next, more);
    make_output<kDtype>(warp, state, corrected);
    MATE_WARP_BARRIER();
    store_output(p, warp, output, static_cast<int>(tokens < kChunk ? tokens : kChunk));

    copy_wait<1>();  // all but the next k_in's
    MATE_BARRIER();
    tokens -= kChunk;
    v += kChunk * p.args.v.stride[1];
    output += kChunk * p.args.output.stride[1];
    operands = &next;
    copy_v(v, more ? tokens : 0);
    copy_q_in(next, more);
    update_state(warp, corrected, rest, s);
  }
  store_state(p, sequence_at(p, n), head, column + warp.channel, s);
}

}  // namespace gpu
}  // namespace mate
