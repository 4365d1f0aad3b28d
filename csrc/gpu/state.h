// A warp's part of a state in registers, from and to the caller's tensors, carries and segments.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

// Transposed: rows are a warp's value channels, columns key channels.
struct State {
  FragC tile[kKeyTiles];
};

template <class Element>
MATE_DEVICE void each_element(const Element& element, int value) {
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) element(t, v, value + row_of(v), t * kBlock + column_of(v));
  }
}

// element(t, v, its address) of a caller's state, for the warp's value channels from `value` on.
template <class Element>
MATE_DEVICE void each_address(const Params& p, const mate_tensor& x, int64_t sequence, int64_t head,
                              int value, const Element& element) {
  const bool v_first = p.args.flags & MATE_STATE_V_FIRST;
  const int64_t size = element_size(x.dtype), step = kBlock * size * (v_first ? 1 : x.stride[2]);
  char* at[8];
  MATE_UNROLL
  for (int v = 0; v < 8; ++v) {
    const int row = value + row_of(v), key = column_of(v);
    at[v] = row_at(x, sequence, head, v_first ? row : key) + (v_first ? key : row) * size;
  }
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) element(t, v, at[v] + t * step);
  }
}

// A slot's state: tile after tile, each as the lanes of a warp hold it.
MATE_DEVICE float* end_tile(const Params& p, int64_t slot, int64_t head, int row_tile,
                            int key_tile) {
  return p.ends + (slot * p.args.heads_v + head) * kDim * kDim +
         (row_tile * kKeyTiles + key_tile) * kTileSize + lane_index() * 4;
}
MATE_DEVICE FragC load_tile(const float* from) {
  const Four a = load_four(from), b = load_four(from + kTileSize / 2);
  return {{a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]}};
}
MATE_DEVICE void store_tile(float* to, const FragC& c) {
  store_four(to, {{c.x[0], c.x[1], c.x[2], c.x[3]}});
  store_four(to + kTileSize / 2, {{c.x[4], c.x[5], c.x[6], c.x[7]}});
}

MATE_DEVICE void load_state(const Params& p, const Segment& segment, int64_t head, int value,
                            State& s) {
  if (!segment.is_first()) {
    const float* from = end_tile(p, segment.slot(p) - 1, head, value / kBlock, 0);
    MATE_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) s.tile[t] = load_tile(from + t * kTileSize);
    return;
  }
  const Sequence& sequence = segment.sequence;
  const mate_tensor& initial = p.args.initial_state;
  if (sequence.first_chunk < p.slab_begin) {  // began in an earlier slab
    const float* carry = p.carry_in + head * kDim * kDim;
    each_element([&](int t, int v, int row, int key) { s.tile[t].x[v] = carry[row * kDim + key]; },
                 value);
  } else if (initial.data) {
    each_address(p, initial, sequence.index, head, value, [&](int t, int v, const char* from) {
      s.tile[t].x[v] = load_element(from, 0, initial.dtype);
    });
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
    each_address(p, final_state, sequence.index, head, value, [&](int t, int v, char* to) {
      store_element(to, 0, final_state.dtype, s.tile[t].x[v]);
    });
  }
}

}  // namespace gpu
}  // namespace mate
