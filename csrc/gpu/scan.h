// The recurrence over chunks: a block a (segment of a sequence, value head, slice of value
// channels).
//
// Everything is transposed: a warp owns 16 value channels, and the rows of its accumulators are
// these. Its slice of the state stays in registers in fp32 for the whole sequence, and each
// product's result is the next one's operand: warps never wait for one another's numbers, only for
// the chunk's operands. Where shared memory holds two stages of these, one barrier a chunk is
// enough: the next chunk's arrive in one stage while the other is being read.
#pragma once

#include "tile.h"

namespace mate {
namespace gpu {

// What a block holds of one chunk.
template <int kSlice>
struct Stage {
  Operands operands;
  uint16_t values[kChunk * kSlice];
};

template <int kSlice, int kStages>
struct ScanShared {
  Stage<kSlice> stage[kStages];
  float weight[2][kSlice / kBlock];  // of a warp's part of a map, after this chunk and the last
  uint16_t scratch[kSlice / kBlock * kScratch + 8];
};

// The warps of a block. Narrow slices have few, whose time decides; others copy for them.
template <int kSlice>
struct Crew {
  static constexpr int kOwners = kSlice / kBlock;  // warps that own 16 value channels each
  static constexpr int kCopiers = kSlice == 128 ? 256 : 128;  // threads
  static constexpr int kFirstCopier = kSlice == 128 ? 0 : kOwners * 32;
  static constexpr int kThreads = kFirstCopier + kCopiers;
};

// ---- copies -------------------------------------------------------------------------------------

template <int kStep, int kCount, int kIndex = 0>
MATE_DEVICE void copy_every(void* to, const void* from) {
  if constexpr (kIndex < kCount) {
    copy_async_at<kIndex * kStep>(to, from);
    copy_every<kStep, kCount, kIndex + 1>(to, from);
  }
}

template <int kThreads, int kBytes>
MATE_DEVICE void copy_image(void* to, const void* from, int copier) {
  constexpr int kPieces = kBytes / 16, kRounds = kPieces / kThreads;
  char* target = static_cast<char*>(to) + copier * 16;
  const char* source = static_cast<const char*>(from) + copier * 16;
  copy_every<kThreads * 16, kRounds>(target, source);
  if (copier < kPieces % kThreads) copy_async_at<kRounds * kThreads * 16>(target, source);
}

template <int kThreads, bool kOutput>
MATE_DEVICE void copy_operands(Operands& to, const Operands& from, int copier) {
  if (kOutput) {
    copy_image<kThreads, sizeof(Operands)>(&to, &from, copier);
  } else {  // without q_in and P
    copy_image<kThreads, sizeof(to.k_in)>(to.k_in, from.k_in, copier);
    constexpr int kRest = sizeof(to.k_out) + sizeof(to.T_high) + sizeof(to.T_low);
    copy_image<kThreads, kRest>(to.k_out, from.k_out, copier);
    copy_image<kThreads, sizeof(to.decay)>(to.decay, from.decay, copier);
  }
}

// The slice's columns of v from the first token on; absent ones are zeros.
template <int kSlice, int kThreads>
MATE_DEVICE void copy_values(const Params& p, const uint16_t* first, int tokens, uint16_t* values,
                             int copier) {
  constexpr int kPieces = kSlice / 8, kRows = kThreads / kPieces;
  const int token = copier / kPieces, column = copier % kPieces * 8;
  const uint16_t* v = first + token * p.args.v.stride[1] + column;
  const auto each_row = [&](const auto& copy) {
    MATE_UNROLL
    for (int i = 0; i < kChunk; i += kRows, v += kRows * p.args.v.stride[1]) {
      copy(Tile<kSlice>{values}.at(i + token, column), i + token < tokens);
    }
  };
  if (p.v_aligned) {
    each_row([&](uint16_t* to, bool present) { copy_async(to, v, present); });
  } else {
    each_row([&](uint16_t* to, bool present) {
      *reinterpret_cast<Eight*>(to) = present ? load_eight(v, 0, false) : Eight{};
    });
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

// A left operand in two bf16 terms.
struct TwoTerms {
  FragA high, low;
};
MATE_DEVICE TwoTerms in_two_terms(const FragC& c, uint16_t* scratch) {
  FragC rest;
  MATE_UNROLL
  for (int v = 0; v < 8; v += 2) {
    const uint32_t high = pack_bf16(c.x[v], c.x[v + 1]);
    rest.x[v] = c.x[v] - from_bits(high << 16);
    rest.x[v + 1] = c.x[v + 1] - from_bits(high & 0xffff0000u);
  }
  return {to_operand(c, scratch), to_operand(rest, scratch)};
}

// decay at the columns of elements v and v + 1
MATE_DEVICE Pair decay_at(const float* decay, int v) {
  if (kNeighbours) return *reinterpret_cast<const Pair*>(decay + column_of(v));
  return {decay[column_of(v)], decay[column_of(v + 1)]};
}

// What the state holds for the chunk's keys, S^T k_in^T, and queries, S^T q_in^T. Each part of it
// decays once it has been read.
MATE_DEVICE void read_state(Operands& in, State& s, FragC (&held)[kTokenTiles],
                            FragC (&output)[kTokenTiles], uint16_t* scratch) {
  const Tile<kDim> k_in{in.k_in}, q_in{in.q_in};
  MATE_UNROLL
  for (int k = 0; k < kKeyTiles; ++k) {
    const FragA state = to_operand(s.tile[k], scratch);
    MATE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      multiply(held[t], state, load_b_columns(k_in, t * kBlock, k * kBlock));
    }
    MATE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      multiply(output[t], state, load_b_columns(q_in, t * kBlock, k * kBlock));
    }
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      const Pair decay = decay_at(in.decay + k * kBlock, v);
      s.tile[k].x[v] *= decay.x;
      s.tile[k].x[v + 1] *= decay.y;
    }
  }
}

// The same of keys alone.
MATE_DEVICE void read_keys(Operands& in, State& s, FragC (&held)[kTokenTiles], uint16_t* scratch) {
  const Tile<kDim> k_in{in.k_in};
  MATE_UNROLL
  for (int k = 0; k < kKeyTiles; ++k) {
    const FragA state = to_operand(s.tile[k], scratch);
    MATE_UNROLL
    for (int t = 0; t < kTokenTiles; ++t) {
      multiply(held[t], state, load_b_columns(k_in, t * kBlock, k * kBlock));
    }
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      const Pair decay = decay_at(in.decay + k * kBlock, v);
      s.tile[k].x[v] *= decay.x;
      s.tile[k].x[v + 1] *= decay.y;
    }
  }
}

// V'^T = (V^T - held) T^T
template <int32_t kDtype, int kSlice>
MATE_DEVICE void correct(Stage<kSlice>& stage, int channel, FragC (&held)[kTokenTiles],
                         TwoTerms (&corrected)[kTokenTiles], uint16_t* scratch) {
  FragC sum[kTokenTiles] = {};
  MATE_UNROLL
  for (int m = 0; m < kTokenTiles; ++m) {
    uint32_t both[4];
    load_c_columns(both, Tile<kSlice>{stage.values}, m * kBlock, channel);
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      const Pair x = unpack<kDtype>(both[v / 2]);
      held[m].x[v] = x.x - held[m].x[v];
      held[m].x[v + 1] = x.y - held[m].x[v + 1];
    }
    const FragA error = to_operand(held[m], scratch);
    MATE_UNROLL
    for (int t = m; t < kTokenTiles; ++t) {
      multiply(sum[t], error, load_b_columns(lower_tile(stage.operands.T_low, t, m), 0, 0));
    }
    MATE_UNROLL
    for (int t = m; t < kTokenTiles; ++t) {
      multiply(sum[t], error, load_b_columns(lower_tile(stage.operands.T_high, t, m), 0, 0));
    }
  }
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) corrected[t] = in_two_terms(sum[t], scratch);
}

// O^T += V'^T P^T
MATE_DEVICE void add_own(Operands& in, const TwoTerms (&corrected)[kTokenTiles],
                         FragC (&output)[kTokenTiles]) {
  MATE_UNROLL
  for (int m = 0; m < kTokenTiles; ++m) {
    MATE_UNROLL
    for (int t = m; t < kTokenTiles; ++t) {
      multiply(output[t], corrected[m].high, load_b_columns(lower_tile(in.P, t, m), 0, 0));
    }
  }
}

// S^T += V'^T k_out. What writes the state may not be rounded to bf16, because the error goes where
// no later delta corrects it: V' in two terms.
MATE_DEVICE void write_state(Operands& in, const TwoTerms (&corrected)[kTokenTiles], State& s) {
  constexpr int kTogether = 4;  // independent products, between those that are not
  const Tile<kDim> k_out{in.k_out};
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    MATE_UNROLL
    for (int first = 0; first < kKeyTiles; first += kTogether) {
      FragB keys[kTogether];
      MATE_UNROLL
      for (int k = 0; k < kTogether; ++k) {
        keys[k] = load_b_rows(k_out, t * kBlock, (first + k) * kBlock);
        multiply(s.tile[first + k], corrected[t].low, keys[k]);
      }
      MATE_UNROLL
      for (int k = 0; k < kTogether; ++k) multiply(s.tile[first + k], corrected[t].high, keys[k]);
    }
  }
}

// O, to where v was.
template <int32_t kDtype, int kSlice>
MATE_DEVICE void keep_output(const FragC (&output)[kTokenTiles], Stage<kSlice>& stage,
                             int channel) {
  MATE_UNROLL
  for (int t = 0; t < kTokenTiles; ++t) {
    uint32_t both[4];
    MATE_UNROLL
    for (int v = 0; v < 8; v += 2) {
      both[v / 2] = pack<kDtype>(output[t].x[v], output[t].x[v + 1]);
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
  const Operands* operands;
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
    operands = p.operands + (segment.begin - p.slab_begin) * p.args.heads_v + head;
    v = reinterpret_cast<uint16_t*>(row_at(p.args.v, sequence.batch, token, head)) + channel;
    output =
        reinterpret_cast<uint16_t*>(row_at(p.args.output, sequence.batch, token, head)) + channel;
    return true;
  }

  MATE_DEVICE void advance(const Params& p) {
    operands += p.args.heads_v;
    v += kChunk * p.args.v.stride[1];
    output += kChunk * p.args.output.stride[1];
    tokens -= kChunk;
    --chunks;
  }

  MATE_DEVICE Rest last(const Params& p, int count) const {
    Rest rest = *this;
    const int64_t skipped = chunks - count;
    rest.operands += skipped * p.args.heads_v;
    rest.v += skipped * kChunk * p.args.v.stride[1];
    rest.output += skipped * kChunk * p.args.output.stride[1];
    rest.tokens -= static_cast<int>(skipped) * kChunk;
    rest.chunks = count;
    return rest;
  }
};

// The first chunk of `rest`, if there is one, as one group of copies.
template <int kSlice, bool kOutput>
MATE_DEVICE void copy_chunk(const Params& p, const Rest& rest, Stage<kSlice>& stage) {
  using Crew = Crew<kSlice>;
  const int copier = thread_index() - Crew::kFirstCopier;
  if (rest.chunks > 0 && copier >= 0) {
    copy_operands<Crew::kCopiers, kOutput>(stage.operands, *rest.operands, copier);
    copy_values<kSlice, Crew::kCopiers>(p, rest.v, rest.tokens, stage.values, copier);
  }
  copy_commit();
}

// The 16 value channels from `channel` of the slice on.
template <int32_t kDtype, int kSlice, bool kOutput>
MATE_DEVICE void walk_chunk(const Params& p, const Rest& rest, Stage<kSlice>& stage, int channel,
                            State& s, uint16_t* scratch) {
  FragC held[kTokenTiles] = {};
  TwoTerms corrected[kTokenTiles];
  if constexpr (kOutput) {
    FragC output[kTokenTiles] = {};
    read_state(stage.operands, s, held, output, scratch);
    correct<kDtype>(stage, channel, held, corrected, scratch);
    add_own(stage.operands, corrected, output);
    write_state(stage.operands, corrected, s);
    keep_output<kDtype>(output, stage, channel);
    MATE_WARP_BARRIER();
    store_output(stage, channel, rest.output, p.args.output.stride[1], rest.tokens,
                 p.output_aligned);
  } else {
    read_keys(stage.operands, s, held, scratch);
    correct<kDtype>(stage, channel, held, corrected, scratch);
    write_state(stage.operands, corrected, s);
  }
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

// All of `rest`; or, if `s` is a map that may die, until it has died: then true comes back. `s` is
// of the calling warp's channels; copying warps have none. The first chunk's copies are under way.
// Without output, everything in shared memory has been read in the end.
template <int32_t kDtype, int kSlice, int kStages, bool kOutput>
MATE_DEVICE bool walk(const Params& p, Rest rest, ScanShared<kSlice, kStages>& shared, State& s,
                      bool may_die = false) {
  const int warp = thread_index() / 32;
  const bool owner = warp < Crew<kSlice>::kOwners;
  uint16_t* const scratch = shared.scratch + warp * kScratch;
  int n = 0;
  for (; rest.chunks > 0; ++n) {
    Stage<kSlice>& stage = shared.stage[n % kStages];
    Rest next = rest;
    next.advance(p);
    copy_wait<0>();
    MATE_BARRIER();  // all copies are here, and the other stage has been read
    if (!kOutput && may_die && n > 0 && is_dead(shared.weight[(n - 1) % 2])) return true;
    if (kStages > 1) copy_chunk<kSlice, kOutput>(p, next, shared.stage[(n + 1) % kStages]);
    if (owner) walk_chunk<kDtype, kSlice, kOutput>(p, rest, stage, warp * kBlock, s, scratch);
    if (!kOutput && may_die && owner) {
      const float weight = weigh(s);
      if (lane_index() == 0) shared.weight[n % 2][warp] = weight;
    }
    if (kStages == 1) {
      MATE_BARRIER();
      copy_chunk<kSlice, kOutput>(p, next, stage);
    }
    rest = next;
  }
  if (kOutput) return false;
  MATE_BARRIER();
  return may_die && is_dead(shared.weight[(n - 1) % 2]);
}

// ---- the kernel ---------------------------------------------------------------------------------

// Blocks are those of the slots, then those of the sequences, for their last segments.
template <int32_t kDtype, int kSlice, int kStages>
MATE_KERNEL(Crew<kSlice>::kThreads, 1)
scan(const Params p) {
  constexpr int kSlices = kDim / kSlice;
  auto& shared = *reinterpret_cast<ScanShared<kSlice, kStages>*>(shared_memory());
  const int64_t unit = block_index() / kSlices / p.args.heads_v;
  const int64_t head = block_index() / kSlices % p.args.heads_v;
  const int slice = static_cast<int>(block_index() % kSlices) * kSlice;
  const int warp = thread_index() / 32, value = slice + warp * kBlock;
  const bool owner = warp < Crew<kSlice>::kOwners, last = unit >= p.slots;

  Segment segment;
  if (last) {
    segment = last_segment(p, unit - p.slots);
  } else if (!inner_segment(p, unit, segment)) {
    return;
  }
  Rest rest;
  if (!rest.find(p, segment, head, slice)) return;
  copy_chunk<kSlice, true>(p, rest, shared.stage[0]);
  State s;
  if (owner) load_state(p, segment, head, value, s);
  walk<kDtype, kSlice, kStages, true>(p, rest, shared, s);
  if (owner && last) store_state(p, segment.sequence, head, value, s);
}

}  // namespace gpu
}  // namespace mate
