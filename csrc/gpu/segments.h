// Segments side by side: where sequences, heads and slices are too few to fill the GPU.
//
// A segment's chunks act on the state as S <- S M + B, rows of S being value channels: each row is
// mapped alike. So a walk from zeros gives B, and a walk from the identity, without values, gives
// M: 128 more value channels. Three launches for a slab:
//   map_segments    B and M of every inner segment; of the first of a part the state at its end. M
//                   may die on the way: nothing of what came before the segment is left
//   join_segments   for each sequence and head the state at each segment's end, in turn
//   scan            all segments, each from its right state
// From map_segments on, a slot's `ends` hold B; from join_segments on the state.
//
// What is not finite and lies before a dead map is forgotten with the rest.
#pragma once

#include "scan.h"

namespace mate {
namespace gpu {

// A map in two bf16 terms, as the right operands that join_segments wants:
// [key tile][tile of rows][term][lane]
constexpr int kMapSize = 2 * kDim * kDim;  // as much memory as a state

MATE_DEVICE uint16_t* map_at(const Params& p, int64_t slot, int64_t head, int key_tile,
                             int row_tile, int term) {
  return p.maps + (slot * p.args.heads_v + head) * kMapSize +
         ((key_tile * kKeyTiles + row_tile) * 2 + term) * kTileSize + lane_index() * 8;
}
MATE_DEVICE FragB load_operand(const uint16_t* from) {
  const Eight x = *reinterpret_cast<const Eight*>(from);
  return {{x.x[0], x.x[1], x.x[2], x.x[3]}};
}
MATE_DEVICE void store_operand(uint16_t* to, const FragB& b) {
  *reinterpret_cast<Eight*>(to) = {{b.x[0], b.x[1], b.x[2], b.x[3]}};
}

// ---- map_segments -------------------------------------------------------------------------------

constexpr int kMapSlice = kDim;  // all of a map's rows in one block
using MapCrew = Crew<kMapSlice>;

// Zeros; or a warp's rows of the identity.
MATE_DEVICE void begin_map(bool identity, int row, State& s) {
  each_element(
      [&](int t, int v, int r, int key) { s.tile[t].x[v] = identity && r == key ? 1.0f : 0.0f; },
      row);
}

// A warp's rows, as columns of two tiles in shared memory.
MATE_DEVICE void keep_transposed(const State& s, int row, const Tile<kDim>& high,
                                 const Tile<kDim>& low) {
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    const Split x = split(s.tile[t]);
    store_c_columns(x.high, high, t * kBlock, row);
    store_c_columns(x.low, low, t * kBlock, row);
  }
}

// Through shared memory, which must hold kMapSize numbers and be free.
MATE_DEVICE void store_map(const Params& p, int64_t slot, int64_t head, const State& s,
                           uint16_t* room) {
  const int warp = thread_index() / 32;
  const Tile<kDim> high{room}, low{room + kDim * kDim};
  keep_transposed(s, warp * kBlock, high, low);
  if (MapCrew::kProducer) {
    barrier_of_first<MapCrew::kOwners * 32>();
  } else {
    MATE_BARRIER();
  }
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    store_operand(map_at(p, slot, head, warp, t, 0),
                  load_b_columns(high, warp * kBlock, t * kBlock));
    store_operand(map_at(p, slot, head, warp, t, 1),
                  load_b_columns(low, warp * kBlock, t * kBlock));
  }
}

// Over how many of the last chunks every channel's decays alone erase what the state held; 0: more
// than kRecent, or than would pay.
constexpr int kRecent = 4;
MATE_DEVICE int erasing_chunks(const Params& p, const Rest& rest) {
  constexpr float kHopeful = kDead / 64;  // maps have weight beside these decays
  Four decay[kRecent];
  MATE_UNROLL
  for (int i = 0; i < kRecent; ++i) {
    if (i >= rest.chunks) continue;
    decay[i] = load_four(rest.operands(p, rest.chunks - 1 - i).decay + lane_index() * 4);
  }
  int count = 0;
  Four left = {{1.0f, 1.0f, 1.0f, 1.0f}};
  MATE_UNROLL
  for (int i = 0; i < kRecent; ++i) {
    if (2 * (i + 1) >= rest.chunks) break;
    left = left * decay[i];
    float sum = (left.x[0] + left.x[1]) + (left.x[2] + left.x[3]);  // NaN stays NaN
    MATE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (count == 0 && sum < kHopeful) count = i + 1;
  }
  return count;
}

// What a block of map_segments walks: B or M of a (slot, head). Where gates forget, the last few
// chunks' map may be dead: then so is M, and B is what these chunks make of zeros. Decays tell when
// to try; that nothing is left only the map can tell, since deltas mix the channels.
struct MapWork {
  Segment segment;
  Rest rest;
  int64_t head, slot;
  int recent;  // chunks to be tried first; 0: none
  bool is_map;

  // False if there is nothing to do.
  MATE_DEVICE bool find(const Params& p) {
    is_map = block_index() % 2;
    head = block_index() / 2 % p.args.heads_v;
    slot = block_index() / 2 / p.args.heads_v;
    if (!inner_segment(p, slot, segment) || (is_map && segment.is_first())) return false;
    rest.find(p, segment, head, 0);
    recent = p.contracts ? erasing_chunks(p, rest) : 0;
    return true;
  }

  // run(chunks, whether of a map, whether of the last after their map died) tells whether the map
  // died. True in the end: so has the segment's.
  template <class Run>
  MATE_DEVICE bool each_walk(const Params& p, const Run& run) const {
    bool dead = false;
    for (bool trial = recent > 0;; trial = false) {
      const bool mapped = trial || is_map;
      Rest now = trial || dead ? rest.last(p, recent) : rest;
      if (mapped) now.tokens = 0;  // no values
      const bool died = run(now, mapped, dead);
      dead = dead || died;
      if (!trial || (dead && is_map)) return dead;
    }
  }

  MATE_DEVICE void begin(const Params& p, bool mapped, bool dead, State& s) const {
    const int row = thread_index() / 32 * kBlock;
    if (mapped || dead || !segment.is_first()) {
      begin_map(mapped, row, s);
    } else {
      load_start(p, segment.sequence, head, row, s);
    }
  }

  // By the threads that own rows, for `scan`.
  MATE_DEVICE void keep_start(const Params& p) const {
    if (is_map || !segment.is_first()) return;
    const int row_tile = thread_index() / 32;
    State s;
    load_start(p, segment.sequence, head, row_tile * kBlock, s);
    MATE_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) {
      store_tile(start_tile(p, slot, head, row_tile, t), s.tile[t]);
    }
  }

  // By the threads that own rows.
  MATE_DEVICE void store(const Params& p, bool dead, const State& s, uint16_t* room) const {
    if (is_map) {
      if (!dead) store_map(p, slot, head, s, room);
      if (thread_index() == 0) p.alive[slot * p.args.heads_v + head] = !dead;
    } else {
      float* to = end_tile(p, slot, head, thread_index() / 32, 0);
      MATE_UNROLL
      for (int t = 0; t < kKeyTiles; ++t) store_tile(to + t * kTileSize, s.tile[t]);
    }
  }
};

template <int32_t kDtype, int kStages>
MATE_DEVICE void produce_map(const Params& p, ScanShared<kMapSlice, kStages>& shared) {
  MapWork work;
  if (!work.find(p)) return;
  Relay<kMapSlice, kStages, false> walk = {shared, 0};
  work.each_walk(p, [&](const Rest& now, bool mapped, bool) {
    return walk.produce(p, now, mapped && p.contracts);
  });
}

// `Walk` or, beside producers, `Relay`.
template <int32_t kDtype, int kStages, template <int, int, bool> class Walk>
MATE_DEVICE void walk_map(const Params& p, ScanShared<kMapSlice, kStages>& shared) {
  MapWork work;
  if (!work.find(p)) return;
  work.keep_start(p);
  Walk<kMapSlice, kStages, false> walk = {shared, 0};
  State s;
  const bool dead = work.each_walk(p, [&](const Rest& now, bool mapped, bool dead) {
    walk.begin(p, now);
    work.begin(p, mapped, dead, s);
    return walk.template run<kDtype>(p, now, s, mapped && p.contracts);
  });
  work.store(p, dead, s, reinterpret_cast<uint16_t*>(&shared));
}

template <int32_t kDtype, int kStages>
MATE_KERNEL(MapCrew::kThreads, 1)
map_segments(const Params p) {
  using Shared = ScanShared<kMapSlice, kStages>;
  static_assert(sizeof(Shared) >= kMapSize * sizeof(uint16_t), "where the map is transposed");
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  begin_copies(shared);
  wait_for_before();
  let_next_begin();
  if constexpr (!MapCrew::kProducer) {
    walk_map<kDtype, kStages, Walk>(p, shared);
  } else if (thread_index() < MapCrew::kFirstCopier) {
    MapCrew::begin_owner<false>();
    walk_map<kDtype, kStages, Relay>(p, shared);
  } else {
    MapCrew::begin_producer<false>();
    produce_map<kDtype>(p, shared);
  }
}

// ---- join_segments ------------------------------------------------------------------------------

constexpr int kJoinThreads = kKeyTiles * 32;  // a warp a tile of key channels
constexpr int kJoinTiles = 2;                 // of value channels, a block
constexpr int kJoinRows = kJoinTiles * kBlock, kJoinBlocks = kDim / kJoinRows;

struct JoinShared {
  uint16_t high[2][kJoinRows * kDim], low[2][kJoinRows * kDim];  // the state, before and after
};
// and behind it whether each of a part's maps is alive

// A warp's part of a state.
struct JoinTiles {
  FragC tile[kJoinTiles];

  MATE_DEVICE void load(const Params& p, int64_t slot, int64_t head, int row_tile) {
    MATE_UNROLL
    for (int r = 0; r < kJoinTiles; ++r) {
      tile[r] = load_tile(end_tile(p, slot, head, row_tile + r, thread_index() / 32));
    }
  }
  MATE_DEVICE void store(const Params& p, int64_t slot, int64_t head, int row_tile) const {
    MATE_UNROLL
    for (int r = 0; r < kJoinTiles; ++r) {
      store_tile(end_tile(p, slot, head, row_tile + r, thread_index() / 32), tile[r]);
    }
  }
};

// A warp's part of a segment's B and M.
struct Step {
  JoinTiles end;
  FragB high[kKeyTiles], low[kKeyTiles];

  MATE_DEVICE void load(const Params& p, int64_t slot, int64_t head, int row_tile) {
    const int warp = thread_index() / 32;
    end.load(p, slot, head, row_tile);
    MATE_UNROLL
    for (int k = 0; k < kKeyTiles; ++k) {
      high[k] = load_operand(map_at(p, slot, head, warp, k, 0));
      low[k] = load_operand(map_at(p, slot, head, warp, k, 1));
    }
  }
};

MATE_DEVICE void keep_state(const JoinTiles& s, const Tile<kDim>& high, const Tile<kDim>& low) {
  const int column = thread_index() / 32 * kBlock;
  MATE_UNROLL
  for (int r = 0; r < kJoinTiles; ++r) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) {
      const int row = r * kBlock + row_of(v), key = column + column_of(v);
      store_split(high.at(row, key), low.at(row, key), s.tile[r].x[v]);
    }
  }
}

// S M + B
MATE_DEVICE void advance_state(const Step& step, const Tile<kDim>& high, const Tile<kDim>& low,
                               JoinTiles& s) {
  MATE_UNROLL
  for (int r = 0; r < kJoinTiles; ++r) {
    FragC main = step.end.tile[r], cross[2] = {};  // independent products
    MATE_UNROLL
    for (int k = 0; k < kKeyTiles; ++k) {
      const FragA state = load_a(high, r * kBlock, k * kBlock);
      multiply(main, state, step.high[k]);
      multiply(cross[0], state, step.low[k]);
      multiply(cross[1], load_a(low, r * kBlock, k * kBlock), step.high[k]);
    }
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) s.tile[r].x[v] = main.x[v] + (cross[0].x[v] + cross[1].x[v]);
  }
}

// A block a (sequence, head, kJoinRows value channels).
MATE_KERNEL(kJoinThreads, 1) join_segments(const Params p) {
  JoinShared& shared = *reinterpret_cast<JoinShared*>(shared_memory());
  int32_t* const alive = reinterpret_cast<int32_t*>(&shared + 1);
  const int row_tile = static_cast<int>(block_index() % kJoinBlocks) * kJoinTiles;
  const int64_t head = block_index() / kJoinBlocks % p.args.heads_v;
  wait_for_before();
  let_next_begin();
  const Segment last = last_segment(p, block_index() / kJoinBlocks / p.args.heads_v);
  if (last.is_first()) return;
  const int64_t first = (last.part - p.slab_begin) / p.segment_chunks;  // slots
  const int count = static_cast<int>(last.slot(p) - first);
  for (int i = thread_index(); i < count; i += kJoinThreads) {
    alive[i] = i > 0 && p.alive[(first + i) * p.args.heads_v + head];
  }
  MATE_BARRIER();
  JoinTiles s;
  Step step = {};
  if (count > 1 && alive[1]) step.load(p, first + 1, head, row_tile);
  for (int i = 1, n = 0; i < count; ++i) {  // what follows a dead map is right as it is
    Step next = {};
    if (i + 1 < count && alive[i + 1]) next.load(p, first + i + 1, head, row_tile);
    if (alive[i]) {
      if (!alive[i - 1]) s.load(p, first + i - 1, head, row_tile);
      const Tile<kDim> high{shared.high[n % 2]}, low{shared.low[n % 2]};
      keep_state(s, high, low);
      MATE_BARRIER();
      advance_state(step, high, low, s);
      s.store(p, first + i, head, row_tile);
      ++n;
    }
    step = next;
  }
}

}  // namespace gpu
}  // namespace mate
