// The recurrence over chunks: a block a (sequence, value head, slice of value channels).
//
// Everything is transposed: a warp owns 16 value channels, and the rows of its accumulators are
// these. Its slice of the state stays in registers in fp32 for the whole sequence, and each
// product's result is the next one's operand: warps never wait for one another's numbers, only for
// the chunk's operands. Where shared memory holds two stages of these, one barrier a chunk is
// enough: the next chunk's arrive in one stage while the other is being read.
//
// Where the architecture has kProducers, a warp group of its own does all copies, and stages are
// handed over by arrivals alone: warp groups that own channels need not wait for each other, so
// that one multiplies while another rounds and adds.
#pragma once

#include "stage.h"
#include "state.h"

namespace mate {
namespace gpu {

// ---- one chunk ----------------------------------------------------------------------------------

// decay at the columns of elements v and v + 1
MATE_DEVICE Pair decay_at(const float* decay, int v) {
  if (kNeighbours) return *reinterpret_cast<const Pair*>(decay + column_of(v));
  return {decay[column_of(v)], decay[column_of(v + 1)]};
}

MATE_DEVICE void decay_state(const StageOperands& in, State& s) {
  MATE_UNROLL
  for (int k = 0; k < kKeyTiles; ++k) {
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      const Pair decay = decay_at(in.decay + k * kBlock, v);
      s.tile[k].x[v] *= decay.x;
      s.tile[k].x[v + 1] *= decay.y;
    }
  }
}

// A warp's channels of v, as they came.
struct Values {
  uint32_t both[kTokenTiles][4];
};
template <int kSlice>
MATE_DEVICE Values load_values(const Stage<kSlice>& stage, int channel) {
  Values v;
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    load_c_columns(v.both[t], Tile<kSlice>{stage.values}, t * kBlock, channel);
  }
  return v;
}

// V - held
template <int32_t kDtype>
MATE_DEVICE FragA form_error(const uint32_t (&both)[4], const FragC& held, uint16_t* scratch) {
  FragC error;
  MATE_UNROLL
  for (int v = 0; v < 8; v += 2) {
    const Pair x = unpack<kDtype>(both[v / 2]);
    error.x[v] = x.x - held.x[v];
    error.x[v + 1] = x.y - held.x[v + 1];
  }
  return to_operand(error, scratch);
}

// O^T = held + V'^T P^T, to where v was.
template <int32_t kDtype, int kSlice>
MATE_DEVICE void keep_output(const FragC (&held)[2 * kTokenTiles],
                             const FragC (&added)[kTokenTiles], Stage<kSlice>& stage, int channel) {
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    const FragC &x = held[kTokenTiles + t], &y = added[t];
    uint32_t both[4];
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      both[v / 2] = pack<kDtype>(x.x[v] + y.x[v], x.x[v + 1] + y.x[v + 1]);
    }
    store_c_columns(both, Tile<kSlice>{stage.values}, t * kBlock, channel);
  }
}

// And from there, to the slice's channels from `first` on. Two lanes a token.
template <int kSlice>
MATE_DEVICE void store_output(const Stage<kSlice>& stage, int channel, uint16_t* first,
                              int64_t stride, int tokens, bool aligned) {
  const Tile<kSlice> values{const_cast<uint16_t*>(stage.values)};
  const int token = lane_index() / 2, column = lane_index() % 2 * 8;
  uint16_t* row = first + token * stride + channel + column;
  const auto each_row = [&](bool in_one) {
    MATE_UNROLL
    for (int t = 0; t < kChunk; t += kBlock, row += kBlock * stride) {
      const auto* from = reinterpret_cast<const Eight*>(values.in_block(t, channel, token, column));
      if (t + token < tokens) store_eight(row, 0, in_one, *from);
    }
  };
  if (aligned) {
    each_row(true);
  } else {
    each_row(false);
  }
}

// ---- a segment ----------------------------------------------------------------------------------

// What is left of a segment, from some chunk on.
struct Rest {
  int place, head;    // of the operands: chunk % ring
  const uint16_t* v;  // the slice's first channel
  uint16_t* output;
  int tokens, chunks;

  // False if there is nothing to do.
  MATE_DEVICE bool find(const Params& p, const Segment& segment, int64_t head, int channel) {
    const Sequence& sequence = segment.sequence;
    const bool empty = sequence.first_chunk == sequence.end_chunk;
    chunks = segment.end > segment.begin ? static_cast<int>(segment.end - segment.begin) : 0;
    // An empty sequence keeps its state; the first slab's launch sees to it.
    if (chunks == 0 && !(empty && p.slab_begin == 0)) return false;
    const int64_t token = sequence.begin + (segment.begin - sequence.first_chunk) * kChunk;
    const int64_t most = static_cast<int64_t>(chunks) * kChunk;
    tokens = static_cast<int>(sequence.end - token < most ? sequence.end - token : most);
    place = static_cast<int>(static_cast<uint32_t>(segment.begin) % static_cast<uint32_t>(p.ring));
    this->head = static_cast<int>(head);
    v = reinterpret_cast<uint16_t*>(row_at(p.args.v, sequence.batch, token, head)) + channel;
    output =
        reinterpret_cast<uint16_t*>(row_at(p.args.output, sequence.batch, token, head)) + channel;
    return true;
  }

  // Some chunks on.
  MATE_DEVICE int place_of(const Params& p, int ahead) const {
    return place + ahead < p.ring ? place + ahead : place + ahead - p.ring;
  }
  MATE_DEVICE int64_t index(const Params& p, int ahead = 0) const {
    return place_of(p, ahead) * p.args.heads_v + head;
  }
  MATE_DEVICE const Operands& operands(const Params& p, int ahead = 0) const {
    return p.operands[index(p, ahead)];
  }

  MATE_DEVICE void advance(const Params& p, int count = 1) {
    place = place_of(p, count);
    v += static_cast<int64_t>(count) * kChunk * p.args.v.stride[1];
    output += static_cast<int64_t>(count) * kChunk * p.args.output.stride[1];
    tokens -= count * kChunk;
    chunks -= count;
  }

  MATE_DEVICE Rest last(const Params& p, int count) const {
    Rest rest = *this;
    rest.advance(p, chunks - count);
    return rest;
  }
};

// The first chunk of `rest`, if there is one, as one group of copies.
template <int kSlice, bool kOutput>
MATE_DEVICE void copy_chunk(const Params& p, const Rest& rest, Stage<kSlice>& stage,
                            Arrival& arrival) {
  using Crew = Crew<kSlice>;
  const int copier = thread_index() - Crew::kFirstCopier;
  if (rest.chunks > 0 && copier >= 0) {
    copy_values<kSlice, Crew::kCopiers>(p, rest.v, rest.tokens, stage.values, copier);
    if (!kBulkCopies) {
      copy_operands<Crew::kCopiers, kOutput>(stage.operands, rest.operands(p), copier);
    } else if (copier == 0) {
      copy_operands<kOutput>(stage.operands, rest.operands(p), arrival);
      if (rest.chunks > 1) prefetch_bulk(&rest.operands(p, 1), sizeof(Operands));
    }
  }
  copy_commit();
}

// The first chunk of `rest` is in shared memory: `prepare` may write other operands there.
MATE_DEVICE void count_read(const Params& p, const Rest& rest) {
  if (kEarlyLaunches && wraps(p)) count_up(&p.reads[rest.index(p)]);
}

// The 16 value channels from `channel` of the slice on:
//   held = S^T [k_in^T q_in^T];  V'^T = (V^T - held_k) T^T
//   O^T = held_q + V'^T P^T;     S^T <- S^T Diag(decay) + V'^T k_out
// What writes the state may not be rounded to bf16, because the error goes where no later delta
// corrects it: V' in two terms.
template <int32_t kDtype, int kSlice, bool kOutput>
MATE_DEVICE void walk_chunk(const Params& p, const Rest& rest, Stage<kSlice>& stage, int channel,
                            State& s, uint16_t* scratch) {
  using Products = typename Crew<kSlice>::Products;
  const StageOperands& in = stage.operands;
  const typename Products::Memory memory{&in};
  FragA state[kKeyTiles], error[kTokenTiles], high[kTokenTiles], low[kTokenTiles];
  FragC held[kOutput ? 2 * kTokenTiles : kTokenTiles], added[kTokenTiles];
  typename Products::Corrected corrected;

  MATE_UNROLL
  for (int k = 0; k < kKeyTiles; ++k) state[k] = to_operand(s.tile[k], scratch);
  decay_state(in, s);
  Products::begin();
  Products::columns(held, state, in.rows, memory);
  Products::commit();
  const Values values = load_values(stage, channel);
  Products::template wait<0>();
  Products::settle(state);
  Products::settle(held);

  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    error[t] = form_error<kDtype>(values.both[t], held[t], scratch);
  }
  Products::begin();
  Products::template lower<2>(corrected.c, error, in.T[0][0], memory);
  Products::commit();
  Products::template wait<0>();
  Products::settle(error);
  Products::settle(corrected);

  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) high[t] = to_operand(corrected.tile(t), scratch);
  const auto form_low = [&] {
    MATE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) low[t] = to_operand(rest_of(corrected.tile(t)), scratch);
  };
  Products::begin();
  if (kOutput) {
    Products::template lower<1>(added, high, in.P[0], memory);
    Products::commit();
  }
  Products::rows(s.tile, high, low, form_low, in.rows, 2 * kChunk, memory);
  Products::commit();
  if constexpr (kOutput) {
    Products::template wait<1>();  // the state is still being written
    Products::settle(added);
    keep_output<kDtype>(held, added, stage, channel);
    MATE_WARP_BARRIER();
    store_output(stage, channel, rest.output, p.args.output.stride[1], rest.tokens,
                 p.output_aligned);
  }
  Products::template wait<0>();
  Products::settle(s.tile);
  Products::settle(high);
  Products::settle(low);
}

// A map is dead when so little is left of it in any warp's rows, and stays so where maps contract.
constexpr float kDead = 0x1p-26f;

// The sum of |s| over a warp's rows.
MATE_DEVICE float weigh(const State& s) {
  float sum[4] = {};
  MATE_UNROLL
  for (int t = 0; t < kKeyTiles; ++t) {
    MATE_UNROLL
    for (int v = 0; v < 8; ++v) sum[v % 4] += fabsf(s.tile[t].x[v]);
  }
  float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  MATE_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) all += shuffle_xor(all, mask);
  return all;
}

template <int kOwners>
MATE_DEVICE bool is_dead(const float (&weight)[kOwners]) {
  bool dead = true;  // which NaN is not
  MATE_UNROLL
  for (int i = 0; i < kOwners; ++i) dead = dead && weight[i] < kDead;
  return dead;
}

// What a block's memory needs before the first copy.
template <int kSlice, int kStages>
MATE_DEVICE void begin_copies(ScanShared<kSlice, kStages>& shared) {
  MATE_UNROLL
  for (int i = 0; i < kStages; ++i) {
    if (Crew<kSlice>::Products::kWholeMatrices) {
      clear_upper<Crew<kSlice>::kThreads>(shared.stage[i].operands);
    }
    if (thread_index() == Crew<kSlice>::kFirstCopier) {
      prepare_arrival(shared.arrival[i], Crew<kSlice>::kProducer ? 1 + Crew<kSlice>::kCopiers : 1);
      if (Crew<kSlice>::kProducer) prepare_arrival(shared.read[i], 32 * Crew<kSlice>::kOwners);
    }
  }
  Crew<kSlice>::Products::publish();
  if (Crew<kSlice>::kProducer) barrier_of_first<Crew<kSlice>::kThreads>();
}

// Chunk after chunk, through stages that take turns.
template <int kSlice, int kStages, bool kOutput>
struct Walk {
  ScanShared<kSlice, kStages>& shared;
  int count;  // of chunks, of all walks of a block

  MATE_DEVICE void copy(const Params& p, const Rest& rest, int ahead) {
    const int i = (count + ahead) % kStages;
    copy_chunk<kSlice, kOutput>(p, rest, shared.stage[i], shared.arrival[i]);
  }

  MATE_DEVICE void begin(const Params& p, const Rest& rest) { copy(p, rest, 0); }

  // All of `rest`; or, if `s` is a map that may die, until it has died: then true comes back. `s`
  // is of the calling warp's channels; copying warps have none. The first chunk's copies are under
  // way. Without output, everything in shared memory has been read in the end.
  template <int32_t kDtype>
  MATE_DEVICE bool run(const Params& p, Rest rest, State& s, bool may_die = false) {
    const int warp = thread_index() / 32;
    const bool owner = warp < Crew<kSlice>::kOwners;
    uint16_t* const scratch = shared.scratch + warp * kScratch;
    bool begun = false;
    for (; rest.chunks > 0; ++count) {
      Stage<kSlice>& stage = shared.stage[count % kStages];
      Rest next = rest;
      next.advance(p);
      copy_wait<0>();
      MATE_BARRIER();  // all copies are here, and the other stage has been read
      const bool dead = !kOutput && may_die && begun && is_dead(shared.weight[(count + 1) % 2]);
      if (kStages > 1 && !dead) copy(p, next, 1);
      wait_arrival(shared.arrival[count % kStages], count / kStages);
      if (dead) {
        ++count;
        return true;
      }
      if (kOutput && thread_index() == 0) count_read(p, rest);
      if (owner) {
        walk_chunk<kDtype, kSlice, kOutput>(p, rest, stage, warp * kBlock, s, scratch);
      }
      if (!kOutput && may_die && owner) {
        const float weight = weigh(s);
        if (lane_index() == 0) shared.weight[count % 2][warp] = weight;
      }
      if (kStages == 1) {
        MATE_BARRIER();
        copy(p, next, 1);
      }
      begun = true;
      rest = next;
    }
    if (kOutput) return false;
    MATE_BARRIER();
    return may_die && is_dead(shared.weight[(count + 1) % 2]);
  }
};

// The same by two roles, where there are producers. Both count the same chunks.
template <int kSlice, int kStages, bool kOutput>
struct Relay {
  using Crew = gpu::Crew<kSlice>;
  ScanShared<kSlice, kStages>& shared;
  int count;  // of chunks, of all walks of a block

  // ---- the producers' side

  // All of `rest`, as stages are given back; until the last has been. True: a map that may die has.
  MATE_DEVICE bool produce(const Params& p, Rest rest, bool may_die = false) {
    const int first = count, end = count + rest.chunks;
    Rest read = rest;
    for (; count < end; ++count) {
      if (await_owners(count - kStages, first, may_die)) return true;
      if (kOutput && count >= kStages) count_read(p, read);
      copy(p, rest);
      rest.advance(p);
    }
    MATE_NO_UNROLL
    for (int i = count - kStages; i < count; ++i) {
      if (await_owners(i, first, may_die)) return true;
      if (kOutput && i >= 0) count_read(p, read);
    }
    return false;
  }

  MATE_DEVICE void count_read(const Params& p, Rest& rest) {
    if (thread_index() == Crew::kFirstCopier) gpu::count_read(p, rest);
    rest.advance(p);
  }

  // Until chunk i has been read. True: the map has died with it.
  MATE_DEVICE bool await_owners(int i, int first, bool may_die) {
    if (i < 0) return false;
    wait_arrival(shared.read[i % kStages], i / kStages);
    return may_die && i >= first && is_dead(shared.weight[i % 2]);
  }

  MATE_DEVICE void copy(const Params& p, const Rest& rest) {
    Stage<kSlice>& stage = shared.stage[count % kStages];
    Arrival& arrival = shared.arrival[count % kStages];
    const int copier = thread_index() - Crew::kFirstCopier;
    if (copier % 32 == 0) {
      produce_operands<kOutput>(stage.operands, rest.operands(p), arrival, copier / 32);
    }
    copy_values<kSlice, Crew::kCopiers>(p, rest.v, rest.tokens, stage.values, copier);
    if (p.v_aligned) {
      arrive_with_copies(arrival);
    } else {
      arrive(arrival);
    }
    if (rest.chunks > 1) prefetch_next(p, rest, copier);
  }

  // Two threads a token.
  MATE_DEVICE void prefetch_next(const Params& p, const Rest& rest, int copier) {
    if (copier == 0) prefetch_bulk(&rest.operands(p, 1), sizeof(Operands));
    const int token = kChunk + copier / 2;
    if (token < rest.tokens) {
      prefetch(rest.v + token * p.args.v.stride[1] + copier % 2 * (kSlice / 2));
    }
  }

  // ---- the owners' side

  MATE_DEVICE void begin(const Params&, const Rest&) {}

  // As Walk::run. Without output, all owners are done in the end.
  template <int32_t kDtype>
  MATE_DEVICE bool run(const Params& p, Rest rest, State& s, bool may_die = false) {
    const int warp = thread_index() / 32;
    bool dead = false;
    for (; rest.chunks > 0 && !dead; ++count) {
      const int i = count % kStages;
      wait_arrival(shared.arrival[i], count / kStages);
      walk_chunk<kDtype, kSlice, kOutput>(p, rest, shared.stage[i], warp * kBlock, s, nullptr);
      if (!kOutput && may_die) dead = has_died(s, warp);
      arrive(shared.read[i]);  // each lane for itself: so compute-sanitizer can follow
      rest.advance(p);
    }
    if (dead) skip(rest.chunks < kStages - 1 ? rest.chunks : kStages - 1);
    if (!kOutput) barrier_of_first<Crew::kOwners * 32>();
    return dead;
  }

  MATE_DEVICE bool has_died(const State& s, int warp) {
    const float weight = weigh(s);
    if (lane_index() == 0) shared.weight[count % 2][warp] = weight;
    barrier_of_first<Crew::kOwners * 32>();
    return is_dead(shared.weight[count % 2]);
  }

  // What the producers had sent before they could know.
  MATE_DEVICE void skip(int chunks) {
    for (int end = count + chunks; count < end; ++count) {
      wait_arrival(shared.arrival[count % kStages], count / kStages);
      arrive(shared.read[count % kStages]);
    }
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

// Blocks are those of the slots, then those of the sequences, for their last segments.
template <int32_t kDtype, int kSlice, int kStages>
MATE_KERNEL(Crew<kSlice>::kThreads, 1)
scan(const Params p) {
  using Crew = Crew<kSlice>;
  constexpr int kSlices = kDim / kSlice;
  auto& shared = *reinterpret_cast<ScanShared<kSlice, kStages>*>(shared_memory());
  const int64_t unit = block_index() / kSlices / p.args.heads_v;
  const int64_t head = block_index() / kSlices % p.args.heads_v;
  const int slice = static_cast<int>(block_index() % kSlices) * kSlice;
  const int warp = thread_index() / 32, value = slice + warp * kBlock;
  const bool owner = warp < Crew::kOwners, last = unit >= p.slots;
  Segment segment;
  Rest rest;
  const bool found = last || inner_segment(p, unit, segment);
  if (last) segment = last_segment(p, unit - p.slots);
  const bool active = found && rest.find(p, segment, head, slice);
  // `plan` has ended: the first `prepare` waits for it before it lets others begin. So a block that
  // has no work need not wait, but one must: launches end in turn.
  if (!active && block_index() > 0) return;
  begin_copies(shared);
  wait_for_before();
  let_next_begin();
  if (!active) return;
  const bool cut = !last || !segment.is_first();
  if constexpr (Crew::kProducer) {
    Relay<kSlice, kStages, true> walk = {shared, 0};
    if (owner) {
      Crew::template begin_owner<true>();
      State s;
      load_state(p, segment, cut, head, value, s);
      walk.template run<kDtype>(p, rest, s);
      if (last) store_state(p, segment.sequence, head, value, s);
    } else {
      Crew::template begin_producer<true>();
      walk.produce(p, rest);
    }
    return;
  }
  Walk<kSlice, kStages, true> walk = {shared, 0};
  walk.begin(p, rest);
  State s;
  if (owner) load_state(p, segment, cut, head, value, s);
  walk.template run<kDtype>(p, rest, s);
  if (owner && last) store_state(p, segment.sequence, head, value, s);
}

}  // namespace gpu
}  // namespace mate
