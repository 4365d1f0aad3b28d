// The C interface of the GPU kernels. Everything of kda.h and layer.h holds, with device pointers;
// fp16 and bf16 inputs, and fp32 where the comments say so. The values of cu_seqlens and of
// state_indices stay on the device: sequences are clamped to [0, total_tokens] there.
//
// What queues work does so on `stream` (a cudaStream_t or musaStream_t) of the current device and
// returns a mate_status or mate_gpu_status. It allocates nothing, waits for nothing, reads no
// device memory on the host: a graph can capture it.
#pragma once

#include "kda.h"
#include "layer.h"

#ifdef __cplusplus
extern "C" {
#endif

enum mate_gpu_status {
  MATE_LAUNCH_FAILED = 3,  // the driver refused a launch: see mate_gpu_last_error
};

// Bytes of device memory that mate_gpu_kda_forward needs beside the tensors, bounded however many
// tokens there are; -1: these arguments are not served. Reads no device memory.
int64_t mate_gpu_kda_workspace(const mate_kda_args* args);

// Queues the forward pass. `workspace` starts at a multiple of 256 bytes and may be used again once
// the stream has passed.
//
// MATE_RECURRENT needs no workspace, takes fp32 inputs too, and all states of one dtype.
// token_states are its alone.
int32_t mate_gpu_kda_forward(const mate_kda_args* args, void* workspace, void* stream);

// Queues a decode step: fp32 inputs too. Two value heads that share a q and k head cost a second,
// small kernel.
int32_t mate_gpu_decode_step(const mate_decode_args* args, void* stream);

// One token of `decode.batch` sequences through a whole layer, projections and all. Weights are
// [outputs, inputs], contiguous, of x's dtype, fp16 or bf16, and so is y; of `decode` the rows q,
// k, v, g, beta, output_gate and output are not read: they lie in the workspace.
typedef struct {
  mate_rows x, y;                            // [batch, hidden]
  const void *q_proj, *k_proj, *v_proj;      // [heads * 128, hidden]
  const void *f_a_proj, *g_a_proj, *b_proj;  // [rank, hidden] twice, [heads_v, hidden]
  const void *f_b_proj, *g_b_proj, *o_proj;  // [heads_v * 128, rank] twice, [hidden, heads_v * 128]
  void* workspace;
  int64_t hidden, rank;  // multiples of 8
  mate_decode_args decode;
} mate_layer_step_args;

#define MATE_MAX_LAYER_STEP_BATCH 4

// Bytes of device memory that mate_gpu_layer_step needs; -1: these arguments are not served.
int64_t mate_gpu_layer_step_workspace(const mate_layer_step_args* args);

// Queues the step. `workspace` starts at a multiple of 16 bytes and may be used again once the
// stream has passed.
int32_t mate_gpu_layer_step(const mate_layer_step_args* args, void* stream);

// Queue what mate_short_conv and mate_gated_norm compute. Of the convolution x and y have one
// dtype; tokens that belong to no sequence get zeros.
int32_t mate_gpu_short_conv(const mate_short_conv_args* args, void* stream);
int32_t mate_gpu_gated_norm(const mate_gated_norm_args* args, void* stream);

// Queues a kernel of one warp that tries what the others rest on: loads and products of 16 x 16
// bf16 `matrices` (two, one behind the other, at a multiple of 16 bytes), shuffles and functions.
// Device pointers; csrc/gpu/probe.h says what `results`, 8 x 256 floats, hold.
int32_t mate_gpu_probe(const void* matrices, float* results, void* stream);

// What the driver said about the last launch of this thread that failed; "" if none did.
const char* mate_gpu_last_error(void);

#ifdef __cplusplus
}
#endif
