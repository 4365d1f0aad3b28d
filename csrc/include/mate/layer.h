// The C interface of what surrounds the recurrence in a KDA layer: short convolution, gated norm,
// and the whole inner layer of a decode step in one call. See kda.h for conventions and functions
// that both share (instruction sets, threads, status codes).
#pragma once

#include "mate/kda.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MATE_MAX_CONV_WIDTH 8

// Rows of contiguous elements, `stride` elements apart.
typedef struct {
  void* data;
  int64_t stride;
  int32_t dtype;
} mate_rows;

// y[t, c] = silu(sum_j weight[c, j] * x[t - width + 1 + j, c]), each sequence behind its own past.
// x, y: {batch, token, -}. States: {sequence, channel, tap}, of x's dtype, oldest input first; they
// must not share memory. weight: contiguous [channels, width].
typedef struct {
  mate_tensor x, y;
  mate_tensor initial_state, final_state;  // data may be null: zeros, do not store
  mate_rows weight;
  const void* cu_seqlens;  // [num_seqs + 1] or null: num_seqs rows of seq_len tokens
  int64_t num_seqs, seq_len, total_tokens, channels;
  int32_t width, cu_seqlens_is_64bit, threads;
} mate_short_conv_args;

// output = weight * x / sqrt(mean(x^2) + eps) * sigmoid(gate), the mean over `dim` elements.
// x, gate, output: strides and `size` count the three outer dimensions.
typedef struct {
  mate_tensor x, gate, output;
  mate_rows weight;
  int64_t size[3], dim;
  float eps;
  int32_t threads;
} mate_gated_norm_args;

// One token of `batch` sequences: short convolutions of q, k and v, SiLU, l2 norm, gate, beta, the
// recurrence, the gated norm. Rows are batch rows: q, k: heads_qk * 128 channels; v, g,
// output_gate, output: heads_v * 128; beta: heads_v. conv_state: rows [2 * heads_qk * 128 +
// heads_v * 128, width], oldest input first, of q's, k's and v's dtype. state: {sequence, head,
// row}. Both states are updated in place; with state_indices, as in mate_kda_args, those of row n
// lie at state_indices[n] of num_states in both. Weights [channels, width] are contiguous.
typedef struct {
  mate_rows q, k, v, g, beta, output_gate, output, conv_state;
  mate_rows q_weight, k_weight, v_weight, norm_weight;
  mate_tensor state;
  const float* A_log;         // [heads_v] or null
  const float* dt_bias;       // [heads_v, 128] or null
  const void* state_indices;  // [batch] or null
  int64_t num_states;
  int64_t batch, heads_qk, heads_v;
  float scale, lower_bound, norm_eps;
  int32_t state_indices_is_64bit, width, gate, flags, threads;
} mate_decode_args;

// Each runs in at most one parallel region and returns a mate_status.
int32_t mate_short_conv(const mate_short_conv_args* args);
int32_t mate_gated_norm(const mate_gated_norm_args* args);
int32_t mate_decode_step(const mate_decode_args* args);

#ifdef __cplusplus
}
#endif
