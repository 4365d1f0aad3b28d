// The AMX kernel's 32 tokens of one head, made ready for the products with the state.
//
// The mathematics is chunk.h's, with one more level in the tree of decays. The two lowest levels
// (pairs, fours) are fp32 arithmetic in registers; from there on L and P come from tile products
// of bf16 operands. Keys and queries stay as the caller gave them, not normalised: with n_i the
// factor that key i lacks, w_i = n_i u_i takes the place of u_i, and rows are scaled where they
// leave the products.
//
// Channels are kept in storage order: within 32 channels the even ones, then the odd ones, which is
// how two instructions unpack 32 bf16 numbers.
#pragma once

#include "amx.h"
#include "rows.h"

namespace mate {
namespace MATE_ISA {

constexpr int kHalf = 16;
constexpr int kSpan = 2 * kHalf;  // tokens
constexpr int kFours = kSpan / 4;

MATE_INLINE int channel_at(int position) {
  return position / 32 * 32 + position % 16 * 2 + position / 16 % 2;
}

// Nothing is kept in fp32 that can leave registers as an operand.
struct Span {
  alignas(64) float e[kSpan][kDim];                    // the decay of each token,
  float over4[kFours][kDim];                           // of blocks of 4 tokens,
  float over8[kFours / 2][kDim];                       // of 8,
  float over16[2][kDim];                               // of 16
  float decay[kDim];                                   // and of the span
  float k_in[4][kDim], q_in[4][kDim], k_out[4][kDim];  // of four tokens at a time, see chunk.h
  float L[kSpan][kSpan], P[kSpan][kSpan];              // of raw keys and queries
  float q_norm[kSpan], k_norm[kSpan];                  // squared
  float output_scale[kSpan];                           // what queries lack: l2 norm and scale
  float v_scale[kSpan], read_scale[kSpan];  // w_i = v_scale v_i - read_scale ((k_in S)_i + ..)
  float beta[kSpan];
  // Operands of L and P between the halves of blocks. Of each half of the span: 8 keys, then 8
  // queries from the right halves of its blocks of 8 (of 16) tokens, and the left halves' keys,
  // first of the blocks of 8. Of the span: 16 keys, then 16 queries of its right half, and the
  // keys of its left half. Keys from the left are wanted transposed.
  Bf16 right[2][2][kHalf][kDim], last_right[2][kHalf][kDim];
  Bf16 left[3][kHalf][kDim];  // of the halves, of the span
  Bf16 left_columns[3][kDim / 2][kHalf][2];
  float product[3][2][kHalf][kHalf];
  // Operands for the state: k_in, q_in; and k_out's high part and low part, as pairs of tokens and
  // transposed.
  Bf16 read[2][kSpan][kDim];
  Bf16 k_out_pairs[2][kSpan / 2][kDim][2];
  Bf16 write[2][kDim][kSpan];
  Bf16 P_rows[kSpan][kSpan];
  Bf16 corner[kHalf][2 * kHalf];  // L's lower left corner: high part, low part
};

alignas(64) static const float kZeros[kDim] = {};

// Elements of 32 channels in storage order.
struct VecPair {
  Vec even, odd;
};

MATE_INLINE VecPair deal(Vec a, Vec b) {
  return {MATE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          MATE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

template <int32_t kDtype>
MATE_INLINE VecPair load_pair(const void* p, int channel) {
  if constexpr (kDtype == MATE_BFLOAT16) {
    const UintVec x = (UintVec)_mm512_loadu_si512(static_cast<const Bf16*>(p) + channel);
    return {(Vec)(x << 16), (Vec)(x & 0xffff0000u)};
  } else {
    return deal(load_as(kDtype, p, channel), load_as(kDtype, p, channel + kWidth));
  }
}

MATE_INLINE VecPair load_two(const float* p) { return {load(p), load(p + kWidth)}; }
MATE_INLINE VecPair times(VecPair a, VecPair b) { return {a.even * b.even, a.odd * b.odd}; }
MATE_INLINE void store_bf16(Bf16* p, VecPair x) { store_bits(p, pack(x.even, x.odd)); }
MATE_INLINE void store_pair(float* p, VecPair x) {
  store(p, x.even);
  store(p + kWidth, x.odd);
}

// The rows of tokens that come later. They lie on a page each, which the processor does not foresee
// by itself; and it can wait for a few lines only at a time, so that a token's are asked for now
// and then: 32 times a span.
struct LaterRows {
  const mate_kda_args& args;
  int64_t batch, head, token, end;

  inline __attribute__((always_inline)) void fetch() {
    const int64_t head_qk = head / (args.heads_v / args.heads_qk);
    const char* g = row(args.g, batch, token, head);
    const char* rows[] = {row(args.q, batch, token, head_qk), row(args.k, batch, token, head_qk),
                          row(args.v, batch, token, head), g};
    const char* output = row(args.output, batch, token, head);
    MATE_UNROLL
    for (int i = 0; i < 16; ++i) __builtin_prefetch(rows[i / 4] + i % 4 * 64, 0, 2);
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(output + i * 64, 1, 2);  // to be written
      if (args.g.dtype == MATE_FLOAT32) __builtin_prefetch(g + 256 + i * 64, 0, 2);
    }
    if (token + 1 < end) ++token;
  }
};

}  // namespace MATE_ISA
}  // namespace mate
