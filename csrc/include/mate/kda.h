// The C interface of the KDA kernels: plain pointers, sizes, strides and codes; no framework.
// The mathematics and every convention are stated in docs/operator.md; kernels trust their
// arguments (mate/functional checks them) but never read or write outside the sequences that
// cu_seqlens, clamped to [0, total_tokens], describes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MATE_ABI_VERSION 3
#define MATE_HEAD_DIM 128

enum mate_dtype { MATE_FLOAT32 = 0, MATE_FLOAT16 = 1, MATE_BFLOAT16 = 2 };
enum mate_gate { MATE_GATE_LOG_DECAY = 0, MATE_GATE_BOUNDED = 1, MATE_GATE_SOFTPLUS = 2 };
enum mate_algorithm { MATE_AUTO = 0, MATE_CHUNK = 1, MATE_RECURRENT = 2 };
enum mate_status { MATE_OK = 0, MATE_OUT_OF_MEMORY = 1, MATE_UNSUPPORTED = 2 };
enum mate_kda_flags {
  MATE_L2NORM = 1,         // q and k are normalised per token and head, eps 1e-6 inside the root
  MATE_BETA_SIGMOID = 2,   // beta holds logits
  MATE_NEG_EIGVAL = 4,     // b = 2 * sigmoid(beta)
  MATE_STATE_V_FIRST = 8,  // state rows are value channels: [V, K]; otherwise [K, V]
};

// Strides count elements; the last dimension (128 channels) is contiguous.
// q, k, v, g, output: {batch, token, head}. beta: the same, one element a head.
// initial_state, final_state: {sequence, head, row}.
typedef struct {
  void* data;
  int64_t stride[3];
  int32_t dtype;
} mate_tensor;

typedef struct {
  mate_tensor q, k, v, g, beta, output;
  mate_tensor initial_state, final_state;  // data may be null: start from zeros, do not store
  // The state after each token, {batch, token, head}, each contiguous; data may be null. Only with
  // MATE_RECURRENT.
  mate_tensor token_states;
  // [num_seqs] or null: of num_states states in initial_state and final_state, sequence n has the
  // one at state_indices[n]; outside [0, num_states) it starts from zeros and stores none.
  const void* state_indices;
  int64_t num_states;
  const float* A_log;      // [heads_v] or null
  const float* dt_bias;    // [heads_v, 128] or null
  const void* cu_seqlens;  // [num_seqs + 1] or null: num_seqs rows of seq_len tokens
  int64_t num_seqs, seq_len, total_tokens;
  int64_t heads_qk, heads_v;
  float scale, lower_bound;
  int32_t cu_seqlens_is_64bit, state_indices_is_64bit;
  int32_t gate, flags, algorithm;
  int32_t threads;
} mate_kda_args;

int32_t mate_abi_version(void);

// Runs the forward pass and returns a mate_status. One parallel region.
int32_t mate_kda_forward(const mate_kda_args* args);

// The instruction set in use: "portable", "avx2", "avx512", "amx". "amx" serves fp16 and bf16
// inputs with bf16 operands and fp32 accumulation, state and triangular solve: relative errors up
// to 4e-3 instead of 1e-6, more for nearly identical keys. fp32 inputs, single tokens and short
// sequences run the "avx512" kernels within it. It needs Linux's permission for tile registers,
// asked for once a process. mate_cpu_use_isa chooses one by name (null: the best that the processor
// has) and returns MATE_UNSUPPORTED where it cannot run.
const char* mate_cpu_isa(void);
int32_t mate_cpu_use_isa(const char* name);

// Runs body(arg) on up to `threads` threads and returns when all have finished: the signature of
// GOMP_parallel, so that the kernels can share the caller's OpenMP pool instead of bringing a
// second one. Null: threads are started for each call.
typedef void (*mate_parallel_fn)(void (*body)(void*), void* arg, unsigned threads, unsigned flags);
void mate_cpu_set_parallel(mate_parallel_fn run);

#ifdef __cplusplus
}
#endif
