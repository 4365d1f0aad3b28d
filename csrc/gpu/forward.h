// The C interface: which arguments are served, and the launches.
#pragma once

#include "layout.h"
#include "plan.h"
#include "prepare.h"
#include "recurrent.h"

namespace mate {
namespace gpu {

inline bool serves(const mate_kda_args& args) {
  const int32_t dtype = args.q.dtype;
  const auto either = [&](const mate_tensor& x) {
    return x.dtype == dtype || x.dtype == MATE_FLOAT32;
  };
  const auto state = [&](const mate_tensor& x) { return !x.data || either(x); };
  return (dtype == MATE_FLOAT16 || dtype == MATE_BFLOAT16) && args.k.dtype == dtype &&
         args.v.dtype == dtype && args.output.dtype == dtype && either(args.g) &&
         either(args.beta) && state(args.initial_state) && state(args.final_state) &&
         args.gate >= MATE_GATE_LOG_DECAY && args.gate <= MATE_GATE_SOFTPLUS &&
         (args.gate == MATE_GATE_LOG_DECAY || (args.A_log && args.dt_bias)) && args.num_seqs >= 0 &&
         args.seq_len >= 0 && args.total_tokens >= 0 && args.heads_qk > 0 && args.heads_v >= 0 &&
         args.heads_v % args.heads_qk == 0 && args.algorithm >= MATE_AUTO &&
         args.algorithm <= MATE_CHUNK && !args.token_states.data && args.num_states >= 0;
}

// Whether two neighbouring keys of a state lie side by side, and can be taken at once.
inline bool is_paired(const mate_kda_args& args, const mate_tensor& x) {
  const int64_t size = x.dtype == MATE_FLOAT32 ? 4 : 2;
  const int64_t states = args.state_indices ? args.num_states : args.num_seqs;
  const int64_t counts[] = {states, args.heads_v, kDim};
  bool paired = kNeighbours && (args.flags & MATE_STATE_V_FIRST) &&
                reinterpret_cast<uintptr_t>(x.data) % (2 * size) == 0;
  for (int i = 0; i < 3; ++i) paired = paired && (counts[i] <= 1 || x.stride[i] % 2 == 0);
  return paired;
}

template <int32_t kDtype, int kSlice, int kStages>
bool launch_scan(const Params& p, bool early, void* stream) {
  const int64_t blocks = (p.slots + p.args.num_seqs) * p.args.heads_v * (kDim / kSlice);
  return launch(scan<kDtype, kSlice, kStages>, blocks, Crew<kSlice>::threads(group_products()),
                static_cast<int>(sizeof(ScanShared<kSlice, kStages>)), stream, p, early);
}
template <int32_t kDtype, int kSlice>
bool launch_scan(const Params& p, bool early, void* stream) {
  const bool two = shared_limit() >= static_cast<int>(sizeof(ScanShared<kSlice, 2>));
  return two ? launch_scan<kDtype, kSlice, 2>(p, early, stream)
             : launch_scan<kDtype, kSlice, 1>(p, early, stream);
}

template <int32_t kDtype, int kStages>
bool launch_map(const Params& p, void* stream) {
  return launch(map_segments<kDtype, kStages>, p.slots * p.args.heads_v * 2,
                MapCrew::threads(group_products()),
                static_cast<int>(sizeof(ScanShared<kMapSlice, kStages>)), stream, p, true);
}

// What must be known before segments are walked side by side.
template <int32_t kDtype>
bool launch_segments(const Params& p, void* stream) {
  const bool two = shared_limit() >= static_cast<int>(sizeof(ScanShared<kMapSlice, 2>));
  if (!(two ? launch_map<kDtype, 2>(p, stream) : launch_map<kDtype, 1>(p, stream))) return false;
  const int64_t shared = static_cast<int64_t>(sizeof(JoinShared)) + p.slots * 4;
  return launch(join_segments, p.args.num_seqs * p.args.heads_v * kJoinBlocks, kJoinThreads,
                static_cast<int>(shared), stream, p, true);
}

// Wide slices read the operands less often; narrow ones spread few heads over more of the GPU.
template <int32_t kDtype>
bool launch_scan(const Params& p, int slice, bool early, void* stream) {
  if (slice == 128) return launch_scan<kDtype, 128>(p, early, stream);
  if (slice == 64) return launch_scan<kDtype, 64>(p, early, stream);
  return launch_scan<kDtype, 32>(p, early, stream);
}

inline int choose_slice(const mate_kda_args& args, const Layout& layout) {
  if (layout.slots > 0) return kMapSlice;
  const int64_t heads = args.num_seqs * args.heads_v, room = multiprocessors();
  if (group_products()) {
    return heads * 2 > room || (layout.slabs > 1 && !Layout::is_roomy(args)) ? 128 : 64;
  }
  return heads * 2 > room ? 128 : heads * 4 > room ? 64 : 32;
}

template <int32_t kDtype>
bool launch_prepare(Params p, int64_t begin, int64_t end, bool early, void* stream) {
  p.prepare_begin = begin;
  p.prepare_end = end;
  const int64_t blocks = (end - begin) * p.args.heads_v;
  return blocks <= 0 || launch(prepare<kDtype>, blocks, kPrepareThreads,
                               static_cast<int>(sizeof(PrepareShared)), stream, p, early);
}

// While a slab is scanned, on some of the multiprocessors, the next is prepared on the others.
//
// A launch that overlaps may begin when all blocks of the one before it run. What makes that safe,
// and every launch must keep: no launch ends before the one before it has. `prepare` sees to it
// with its last block alone, and begins at once, as far as there is room in the ring; all others
// wait for the launch before them first. So where a launch begins, all but the last before it have
// ended.
template <int32_t kDtype>
bool launch_slabs(Params p, const Layout& layout, float* carry, void* stream) {
  const int slice = choose_slice(p.args, layout);
  p.readers = kDim / slice;
  // The first launch waits for all that the caller has queued, and need not say so.
  bool early = p.args.cu_seqlens;
  if (!launch_prepare<kDtype>(p, 0, layout.slab_end(0), early, stream)) return false;
  early = layout.slab_end(0) > 0;  // behind `plan` alone nothing may begin
  for (int64_t slab = 0; slab < layout.slabs; ++slab) {
    p.slab_begin = slab == 0 ? 0 : p.slab_end;
    p.slab_end = layout.slab_end(slab);
    // A slab may end the sequence that the one before cut, and cut another.
    p.carry_in = carry + slab % 2 * Layout::state_elements(p.args);
    p.carry_out = carry + (slab + 1) % 2 * Layout::state_elements(p.args);
    const int64_t next = layout.slab_end(slab + 1);
    int64_t prepared = p.slab_end;
    if (p.slots > 0) {
      if (!launch_segments<kDtype>(p, stream)) return false;
      // join_segments leaves most room; but what this slab holds must be scanned first.
      const int64_t free = p.slab_begin + layout.ring;
      prepared = free < prepared ? prepared : free < next ? free : next;
      if (!launch_prepare<kDtype>(p, p.slab_end, prepared, true, stream)) return false;
    }
    if (!launch_scan<kDtype>(p, slice, early, stream)) return false;
    if (!launch_prepare<kDtype>(p, prepared, next, true, stream)) return false;
  }
  return true;
}

inline bool launch_all(const mate_kda_args& args, const Layout& layout, char* workspace,
                       void* stream) {
  Params p = {};
  p.args = args;
  p.bounds = reinterpret_cast<int64_t*>(workspace);
  p.first_chunk = reinterpret_cast<int64_t*>(workspace + layout.first_chunk);
  p.chunk_tokens = reinterpret_cast<ChunkTokens*>(workspace + layout.chunk_tokens);
  p.segment_chunks = layout.segment_chunks > 0 ? layout.segment_chunks : 1;
  p.slots = layout.slots;
  p.reads = reinterpret_cast<uint32_t*>(workspace + layout.reads);
  p.ring = static_cast<int32_t>(layout.ring > 0 ? layout.ring : 1);
  p.chunks = layout.chunks;
  p.ends = reinterpret_cast<float*>(workspace + layout.ends);
  p.maps = reinterpret_cast<uint16_t*>(workspace + layout.maps);
  p.alive = reinterpret_cast<int32_t*>(workspace + layout.alive);
  p.operands = reinterpret_cast<Operands*>(workspace + layout.operands);
  p.heads = Divisor::of(args.heads_v);
  p.rings = Divisor::of(p.ring);
  p.group = Divisor::of(args.heads_v / args.heads_qk);
  p.length = Divisor::of(count_of(args.seq_len, kChunk));
  p.contracts = (args.flags & MATE_L2NORM) && (args.flags & MATE_BETA_SIGMOID);
  const int64_t batch = args.cu_seqlens ? 1 : args.num_seqs;
  p.q_aligned = rows_aligned(args.q, batch, args.total_tokens, args.heads_qk);
  p.k_aligned = rows_aligned(args.k, batch, args.total_tokens, args.heads_qk);
  p.v_aligned = rows_aligned(args.v, batch, args.total_tokens, args.heads_v);
  p.g_aligned = rows_aligned(args.g, batch, args.total_tokens, args.heads_v);
  p.output_aligned = rows_aligned(args.output, batch, args.total_tokens, args.heads_v);
  p.initial_paired = is_paired(args, args.initial_state);
  p.final_paired = is_paired(args, args.final_state);
  if (args.cu_seqlens && !launch(plan, 1, kPlanThreads, kPlanShared, stream, p)) return false;
  float* carry = reinterpret_cast<float*>(workspace + layout.carry);
  return args.q.dtype == MATE_FLOAT16 ? launch_slabs<MATE_FLOAT16>(p, layout, carry, stream)
                                      : launch_slabs<MATE_BFLOAT16>(p, layout, carry, stream);
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int32_t mate_abi_version(void) { return MATE_ABI_VERSION; }

MATE_EXPORT int64_t mate_gpu_kda_workspace(const mate_kda_args* args) {
  if (args->algorithm == MATE_RECURRENT) return mate::gpu::serves_recurrent(*args) ? 0 : -1;
  if (!mate::gpu::serves(*args)) return -1;
  return args->heads_v == 0 ? 0 : mate::gpu::Layout(*args).bytes;
}

MATE_EXPORT int32_t mate_gpu_kda_forward(const mate_kda_args* args, void* workspace, void* stream) {
  using namespace mate::gpu;
  if (args->algorithm == MATE_RECURRENT) return run_recurrent(*args, stream);
  if (!serves(*args)) return MATE_UNSUPPORTED;
  if (args->num_seqs == 0 || args->heads_v == 0) return MATE_OK;
  const Layout layout(*args);
  const int64_t most = INT32_MAX;  // blocks of a launch
  if (layout.slab_chunks > most / args->heads_v || layout.chunks > most ||
      args->num_seqs + layout.slots > most / (4 * args->heads_v)) {
    return MATE_UNSUPPORTED;
  }
  if (!launch_all(*args, layout, static_cast<char*>(workspace), stream)) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

MATE_EXPORT const char* mate_gpu_last_error(void) { return mate::gpu::last_error(); }
