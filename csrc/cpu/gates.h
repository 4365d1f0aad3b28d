// The AMX kernel's gates: decays of single tokens and of blocks of them. Bf16 operands follow, so
// that exponentials need fewer digits than simd.h's.
#pragma once

#include "span.h"

namespace mate {
namespace MATE_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x with a relative error of 4e-6; exact for whole numbers, 0 for -inf. scale_by_power_of_two
// rounds x down by itself, and f is what that leaves.
MATE_INLINE Vec exp2(Vec x) {
  const Vec f = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);
  Vec p = f * 0.01355575f + 0.05203237f;
  p = p * f + 0.24137976f;
  p = p * f + 0.69303212f;
  p = p * f + 1.0f;
  return scale_by_power_of_two(p, x);
}

// One head's gate, in units of log 2 and with its bias in storage order.
struct SpanGate {
  HeadGate gate;
  float slope, height;  // bounded: height / (1 + 2^(slope g + bias))
  alignas(64) float bias[kDim];
};

static void load_gate(const mate_kda_args& args, int64_t head, SpanGate& out) {
  out.gate = head_gate(args, head);
  out.slope = -out.gate.rate * kLog2E;
  out.height = out.gate.lower_bound * kLog2E;
  if (!out.gate.bias) return;
  const float factor = args.gate == MATE_GATE_BOUNDED ? out.slope : 1.0f;
  for (int c = 0; c < kDim; ++c) out.bias[c] = factor * out.gate.bias[channel_at(c)];
  out.gate.bias = out.bias;
}

// The log-decay in units of log 2; of the bounded gate to 14 bits.
template <int32_t kGate>
MATE_INLINE Vec log2_decay(const SpanGate& gate, Vec g, int c) {
  if constexpr (kGate == MATE_GATE_BOUNDED) {
    Vec x = g * gate.slope + load(gate.bias + c);
    x = (Vec)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(126.0f), (__m512)x);  // NaN passes
    return (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)(exp2(x) + 1.0f)) * gate.height;
  } else {
    HeadGate known = gate.gate;
    known.kind = kGate;
    return log_decay(known, g, c) * kLog2E;
  }
}

// e of `n` tokens and their products over blocks.
template <int32_t kGate, int32_t kDtype>
static void load_gates_as(const mate_kda_args& args, const WorkItem& item, const SpanGate& gate,
                          int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  const char* first = row(args.g, item.batch, token, head);
  const int64_t stride = args.g.stride[1] * element_size(kDtype);
  for (int c = 0; c < kDim; c += 32) {
    VecPair total = {}, over8 = {}, over16 = {};
    for (int four = 0; four < kFours; ++four) {
      VecPair over4 = {splat(1.0f), splat(1.0f)};
      MATE_UNROLL
      for (int i = 4 * four; i < 4 * four + 4; ++i) {
        VecPair e = {splat(1.0f), splat(1.0f)};  // absent tokens do not decay
        if (i < n) {
          const VecPair g = load_pair<kDtype>(first + i * stride, c);
          const Vec a = log2_decay<kGate>(gate, g.even, c);
          const Vec b = log2_decay<kGate>(gate, g.odd, c + kWidth);
          total.even += a;
          total.odd += b;
          e = {exp2(a), exp2(b)};
        }
        store_pair(span.e[i] + c, e);
        over4 = times(over4, e);
      }
      store_pair(span.over4[four] + c, over4);
      over8 = four % 2 ? times(over8, over4) : over4;
      if (four % 2) {
        store_pair(span.over8[four / 2] + c, over8);
        over16 = four % 4 == 3 ? times(over16, over8) : over8;
        if (four % 4 == 3) store_pair(span.over16[four / 4] + c, over16);
      }
    }
    const float log_2 = 0.693147181f;
    store_pair(span.decay + c,
               {plain_nan(exp(total.even * log_2)), plain_nan(exp(total.odd * log_2))});
    later.fetch();
    later.fetch();
  }
}

template <int32_t kGate>
static void load_gates_of(const mate_kda_args& args, const WorkItem& item, const SpanGate& gate,
                          int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  switch (args.g.dtype) {
    case MATE_FLOAT32:
      return load_gates_as<kGate, MATE_FLOAT32>(args, item, gate, token, n, head, later, span);
    case MATE_FLOAT16:
      return load_gates_as<kGate, MATE_FLOAT16>(args, item, gate, token, n, head, later, span);
    default:
      return load_gates_as<kGate, MATE_BFLOAT16>(args, item, gate, token, n, head, later, span);
  }
}

static void load_gates(const mate_kda_args& args, const WorkItem& item, const SpanGate& gate,
                       int64_t token, int n, int64_t head, LaterRows& later, Span& span) {
  switch (gate.gate.kind) {
    case MATE_GATE_BOUNDED:
      return load_gates_of<MATE_GATE_BOUNDED>(args, item, gate, token, n, head, later, span);
    case MATE_GATE_SOFTPLUS:
      return load_gates_of<MATE_GATE_SOFTPLUS>(args, item, gate, token, n, head, later, span);
    default:
      return load_gates_of<MATE_GATE_LOG_DECAY>(args, item, gate, token, n, head, later, span);
  }
}

}  // namespace MATE_ISA
}  // namespace mate
