// AMX: 16-bit inputs, 32 tokens at a time. The products with the state run in tile registers on
// bf16 operands; the state between spans, the triangular solve and all accumulation are fp32.
#define MATE_ISA amx
#define MATE_SIMD_WIDTH 16
#include "gates.h"
#include "pairs.h"
#include "products.h"

namespace mate {
namespace amx {

template <int32_t kDtype>
static void run_span(const mate_kda_args& args, const WorkItem& item, const SpanGate& gate,
                     int64_t token, int n, int64_t head, const State& state, Span& span, Work& work,
                     LaterRows& later) {
  load_gates(args, item, gate, token, n, head, later, span);
  for (int four = 0; four < kFours; ++four) {
    load_four<kDtype>(args, item, token, n, head, four, span);
    later.fetch();
  }
  make_columns(span);
  multiply_pairs(span);
  load_scales(args, item, token, n, head, span);
  for (int c = 0; c < kDim; c += kWidth) make_writes(c, span);
  finish_pairs(span);
  run_panels<kDtype>(args, item, token, n, head, state, span, work, later);
  update_state(span, state, work, later);
}

// ---- state --------------------------------------------------------------------------------------

static State head_state(const WorkItem& item, int64_t head, float* states) {
  const int columns = item.column_end - item.column_begin;
  Bf16* p = reinterpret_cast<Bf16*>(states + (head - item.head_begin) * columns * kDim);
  return {p, p + columns * kDim, columns};
}

// The caller's state <-> ours, through 16 value channels of [K, V] in natural order.
static void load_state(const mate_kda_args& args, const WorkItem& item, int64_t head,
                       const State& to) {
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  for (int column = item.column_begin; column < item.column_end; column += 16) {
    alignas(64) float natural[kDim][16];
    if (has_state(args.initial_state, item)) {
      const Block from = state_block(args, args.initial_state, item, head, column);
      copy_block(from, {natural, MATE_FLOAT32, 16}, kDim, 16, v_first);
    } else {
      __builtin_memset(natural, 0, sizeof(natural));
    }
    for (int c = 0; c < kDim; c += 2) {
      const int at = c * to.columns + 2 * (column - item.column_begin);
      store_rows(
          to.high + at, to.low + at,
          {plain_nan(load(natural[channel_at(c)])), plain_nan(load(natural[channel_at(c + 1)]))});
    }
  }
}

static void store_state(const mate_kda_args& args, const WorkItem& item, int64_t head,
                        const State& from) {
  if (!has_state(args.final_state, item)) return;
  const bool v_first = args.flags & MATE_STATE_V_FIRST;
  for (int column = item.column_begin; column < item.column_end; column += 16) {
    alignas(64) float natural[kDim][16];
    for (int c = 0; c < kDim; c += 2) {
      const int at = c * from.columns + 2 * (column - item.column_begin);
      const VecTwo x = load_rows(from.high + at, from.low + at);
      store(natural[channel_at(c)], x.a);
      store(natural[channel_at(c + 1)], x.b);
    }
    const Block to = state_block(args, args.final_state, item, head, column);
    copy_block({natural, MATE_FLOAT32, 16}, to, v_first ? 16 : kDim, v_first ? kDim : 16, v_first);
  }
}

// ---- an item ------------------------------------------------------------------------------------

// Time outside, heads inside: see chunk.h.
static void run_chunked(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  const TileRegisters registers;
  static_assert(sizeof(Span) + sizeof(Work) <= kSpanFloats * sizeof(float), "the planner's");
  Span& span = *reinterpret_cast<Span*>(scratch);
  Work& work = *reinterpret_cast<Work*>(scratch + sizeof(Span) / sizeof(float));
  float* states = scratch + kSpanFloats;
  __builtin_memset(&span, 0, sizeof(span));
  SpanGate gates[kMaxHeads];
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    load_gate(args, h, gates[h - item.head_begin]);
    load_state(args, item, h, head_state(item, h, states));
  }
  for (int64_t t = item.begin; t < item.end; t += kSpan) {
    const int n = item.end - t < kSpan ? static_cast<int>(item.end - t) : kSpan;
    for (int64_t h = item.head_begin; h < item.head_end; ++h) {
      const bool last_head = h + 1 == item.head_end;
      LaterRows later = {args, item.batch, last_head ? item.head_begin : h + 1,
                         last_head && t + kSpan < item.end ? t + kSpan : t, item.end};
      const SpanGate& gate = gates[h - item.head_begin];
      const State state = head_state(item, h, states);
      if (args.q.dtype == MATE_BFLOAT16) {
        run_span<MATE_BFLOAT16>(args, item, gate, t, n, h, state, span, work, later);
      } else {
        run_span<MATE_FLOAT16>(args, item, gate, t, n, h, state, span, work, later);
      }
    }
  }
  for (int64_t h = item.head_begin; h < item.head_end; ++h) {
    store_state(args, item, h, head_state(item, h, states));
  }
}

// Inputs of fp32 keep fp32 arithmetic, and sequences that leave half a span empty are faster there.
void run_item(const mate_kda_args& args, const WorkItem& item, float* scratch) {
  const int32_t dtype = args.q.dtype;
  const bool sixteen_bits = dtype != MATE_FLOAT32 && args.k.dtype == dtype && args.v.dtype == dtype;
  if (sixteen_bits && !item.recurrent && item.end - item.begin > kHalf) {
    run_chunked(args, item, scratch);
  } else {
    avx512::run_item(args, item, scratch);
  }
}

}  // namespace amx
}  // namespace mate
