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

// The same for two neighbours of a row at a time, where these lie side by side.
template <class Pairs>
MATE_DEVICE void each_pair(const mate_tensor& x, int64_t sequence, int64_t head, int value,
                           const Pairs& pair) {
  const int size = element_size(x.dtype);
  char* at[4];
  MATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    at[i] = row_at(x, sequence, head, value + row_of(2 * i)) + column_of(2 * i) * size;
  }
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) pair(t, 2 * i, at[i] + t * kBlock * size);
  }
}

// States of our own: tile after tile, each as the lanes of a warp hold it.
MATE_DEVICE float* tile_of(float* states, int64_t index, int row_tile, int key_tile) {
  return states + index * kDim * kDim + (row_tile * kKeyTiles + key_tile) * kTileSize +
         lane_index() * 4;
}
MATE_DEVICE float* end_tile(const Params& p, int64_t slot, int64_t head, int row_tile,
                            int key_tile) {
  return tile_of(p.ends, slot * p.args.heads_v + head, row_tile, key_tile);
}
// The state that a part of several segments begins with: where its first segment has no map.
MATE_DEVICE float* start_tile(const Params& p, int64_t slot, int64_t head, int row_tile,
                              int key_tile) {
  return tile_of(reinterpret_cast<float*>(p.maps), slot * p.args.heads_v + head, row_tile,
                 key_tile);
}
MATE_DEVICE FragC load_tile(const float* from) {
  const Four a = load_four(from), b = load_four(from + kTileSize / 2);
  return {{a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]}};
}
MATE_DEVICE void store_tile(float* to, const FragC& c) {
  store_four(to, {{c.x[0], c.x[1], c.x[2], c.x[3]}});
  store_four(to + kTileSize / 2, {{c.x[4], c.x[5], c.x[6], c.x[7]}});
}

template <int32_t kDtype>
MATE_DEVICE void unpack_state(const uint32_t (&both)[kKeyTiles][4], State& s) {
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Pair x = unpack<kDtype>(both[t][i]);
      s.tile[t].x[2 * i] = x.x;
      s.tile[t].x[2 * i + 1] = x.y;
    }
  }
}

MATE_DEVICE int64_t state_of(const Params& p, int64_t sequence) {
  const mate_kda_args& a = p.args;
  return state_index(a.state_indices, a.state_indices_is_64bit, a.num_states, sequence);
}

// All loads are under way before the first is needed.
MATE_DEVICE void load_initial(const Params& p, int64_t index, int64_t head, int value, State& s) {
  const mate_tensor& x = p.args.initial_state;
  const bool wide = x.dtype == MATE_FLOAT32;
  if (wide && p.initial_paired) {
    each_pair(x, index, head, value, [&](int t, int v, const char* from) {
      const Pair pair = *reinterpret_cast<const Pair*>(from);
      s.tile[t].x[v] = pair.x;
      s.tile[t].x[v + 1] = pair.y;
    });
    return;
  }
  if (wide) {
    each_address(p, x, index, head, value, [&](int t, int v, const char* from) {
      s.tile[t].x[v] = *reinterpret_cast<const float*>(from);
    });
    return;
  }
  uint32_t both[kKeyTiles][4] = {};
  if (p.initial_paired) {
    each_pair(x, index, head, value, [&](int t, int v, const char* from) {
      both[t][v / 2] = *reinterpret_cast<const uint32_t*>(from);
    });
  } else {
    each_address(p, x, index, head, value, [&](int t, int v, const char* from) {
      const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
      both[t][v / 2] |= bits << v % 2 * 16;
    });
  }
  if (x.dtype == MATE_FLOAT16) {
    unpack_state<MATE_FLOAT16>(both, s);
  } else {
    unpack_state<MATE_BFLOAT16>(both, s);
  }
}

MATE_DEVICE void store_final(const Params& p, int64_t index, int64_t head, int value,
                             const State& s) {
  const mate_tensor& x = p.args.final_state;
  if (!p.final_paired) {
    each_address(p, x, index, head, value,
                 [&](int t, int v, char* to) { store_element(to, 0, x.dtype, s.tile[t].x[v]); });
    return;
  }
  each_pair(x, index, head, value, [&](int t, int v, char* to) {
    const Pair pair = {s.tile[t].x[v], s.tile[t].x[v + 1]};
    if (x.dtype == MATE_FLOAT32) {
      *reinterpret_cast<Pair*>(to) = pair;
    } else {
      *reinterpret_cast<uint32_t*>(to) = x.dtype == MATE_FLOAT16
                                             ? pack<MATE_FLOAT16>(pair.x, pair.y)
                                             : pack<MATE_BFLOAT16>(pair.x, pair.y);
    }
  });
}

// What a part of a sequence begins with.
MATE_DEVICE void load_start(const Params& p, const Sequence& sequence, int64_t head, int value,
                            State& s) {
  if (sequence.first_chunk < p.slab_begin) {  // began in an earlier slab
    MATE_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) {
      s.tile[t] = load_tile(tile_of(p.carry_in, head, value / kBlock, t));
    }
  } else if (p.args.initial_state.data && state_of(p, sequence.index) >= 0) {
    load_initial(p, state_of(p, sequence.index), head, value, s);
  } else {
    each_element([&](int t, int v, int, int) { s.tile[t].x[v] = 0.0f; }, value);
  }
}

// What a segment begins with. A cut part's last segment may store the final state before the first
// begins, in the same memory.
MATE_DEVICE void load_state(const Params& p, const Segment& segment, bool cut, int64_t head,
                            int value, State& s) {
  if (!cut) return load_start(p, segment.sequence, head, value, s);
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    s.tile[t] =
        load_tile(segment.is_first() ? start_tile(p, segment.slot(p), head, value / kBlock, t)
                                     : end_tile(p, segment.slot(p) - 1, head, value / kBlock, t));
  }
}

MATE_DEVICE void store_state(const Params& p, const Sequence& sequence, int64_t head, int value,
                             const State& s) {
  const bool begun = sequence.first_chunk < p.slab_end;  // empty ones may lie far beyond
  if (begun && sequence.end_chunk > p.slab_end) {
    MATE_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) {
      store_tile(tile_of(p.carry_out, head, value / kBlock, t), s.tile[t]);
    }
  } else if (p.args.final_state.data && state_of(p, sequence.index) >= 0) {
    store_final(p, state_of(p, sequence.index), head, value, s);
  }
}

}  // namespace gpu
}  // namespace mate
