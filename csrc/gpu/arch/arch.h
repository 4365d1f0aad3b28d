// What a kernel may use of the machine. Each header beside this one offers the same names:
//
// clang-format off
//   MATE_DEVICE, MATE_KERNEL(threads, blocks)       functions; blocks that must fit a multiprocessor
//   MATE_UNROLL, MATE_NO_UNROLL                     loops
//   thread_index(), block_index(), lane_index()     blocks are one-dimensional, warps 32 wide
//   shared_memory()                                 of the size that the launch asks for
//   MATE_BARRIER(), MATE_WARP_BARRIER()             all threads of a block, of a warp
//   shuffle_xor(x, mask)                            the value of lane ^ mask
//   FragA, FragB, FragC                             a warp's 16 x 16 operands and accumulator
//   load_a, load_b_columns, load_b_rows, multiply   C += A B; bf16 operands, fp32 accumulators
//   as_columns(a)                                   B[k][n] = A[n][k]
//   scale_rows(b, factors)                          B[k][n] times factors[k]
//   row_of(v), column_of(v)                         where element v of this lane's FragC lies
//   kNeighbours                                     are elements 2 i and 2 i + 1 neighbours in a row?
//   load_c_columns, store_c_columns, store_c_rows   a FragC's elements as 16-bit numbers
//   to_operand(c, scratch)                          a FragC rounded to a FragA
//   copy_async, copy_commit, copy_wait<N>           16 bytes to shared memory, in groups
//   copy_async_at<kOffset>                          so many bytes on, on both sides
//   kBulkCopies                                     whether one thread can copy for all:
//   Arrival, prepare_arrival(x, n), expect_bytes(x, n), copy_bulk(to, from, n, x),
//   wait_arrival(x, i), prefetch_bulk(from, n)
//   arrive(x), arrive_with_copies(x)                by hand; when this thread's copies are here
//   kProducers                                      whether a warp group may do nothing but copy:
//   barrier_of_first<N>(), take_registers<N>(), leave_registers<N>(), prefetch(from)
//   to_bf16, pack_bf16, from_fp16, to_fp16, pack_fp16, from_bits, to_bits
//   multiply_bf16(x, y)                             two products, rounded
//   fast_exp2, fast_log2, fast_reciprocal, fast_rsqrt
//   expf, expm1f, log1pf, fabsf, fmaxf          the machine's own, to a few ulp
//   launch, multiprocessors, shared_limit, last_error,  on the host
//   group_products, overlaps                        whether the device's kernels have them, are early
//   kEarlyLaunches                                  whether launches may overlap:
//   wait_for_before(), let_next_begin(), count_up(x), await_count(x, n)
// A kernel launched as `early` may begin when all blocks of the launch before have called
// let_next_begin() or ended; wait_for_before() ends when that launch has, with all it wrote. What
// one of them counts up another may await: then what the counting thread had read may be written.
// clang-format on
// An accumulator need not have an operand's layout: to_operand may go through `scratch`,
// kScratch elements of shared memory a warp.
#pragma once

#if defined(__MUSACC__) || defined(MATE_MUSA)
#include "musa.h"
#elif defined(__CUDACC__)
#include "cuda.h"
#else
#include "host.h"
#endif
