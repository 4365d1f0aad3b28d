// What a kernel may use of the machine. Each header beside this one offers the same names:
//
//   MATE_DEVICE, MATE_KERNEL(threads, blocks), MATE_UNROLL  how functions and loops are declared
//   thread_index(), block_index(), shared_memory()  where a thread is; one-dimensional blocks
//   MATE_BARRIER(), MATE_WARP_BARRIER()                all threads of a block, of a warp of 32
//   shuffle_xor(x, mask)                               the value of lane ^ mask
//   FragA, FragB, FragC                                a warp's 16 x 16 operands and accumulator
//   load_a, load_b_columns, load_b_rows, multiply      C += A B; bf16 operands, fp32 accumulators
//   row_of(v), column_of(v)                            where element v of this lane's FragC lies
//   to_operand(c, scratch)                             a FragC rounded to a FragA
//   copy_async, copy_commit, copy_wait<N>              16 bytes to shared memory, in groups
//   pack_bf16, from_fp16, to_fp16, fast_exp            numbers
//   launch, multiprocessors, last_error                on the host
//
// An accumulator need not have an operand's layout: to_operand may go through `scratch`,
// kScratch elements of shared memory a warp.
#pragma once

#if defined(__CUDACC__)
#include "cuda.h"
#else
#include "host.h"
#endif
