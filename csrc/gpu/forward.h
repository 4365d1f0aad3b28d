// The C interface: which arguments are served, the workspace, and the launches.
#pragma once

#include "plan.h"
#include "prepare.h"
#include "recurrent.h"
#include "segments.h"

namespace mate {
namespace gpu {

// Operands are kept for so many bytes of chunks at a time.
#if !defined(MATE_GPU_SLAB_BYTES)
#define MATE_GPU_SLAB_BYTES (224 << 20)
#endif

inline int64_t count_of(int64_t all, int64_t each) { return (all + each - 1) / each; }

// Segments side by side (segments.h), where blocks are few. Costs are in times of a chunk: what a
// walk begins with, a step of join_segments, the launches on top.
constexpr int64_t kMostSlots = 160;  // of all heads: 20 MiB
constexpr double kStartCost = 3, kJoinCost = 0.7, kLaunchCost = 6;

// Of a walk over `chunks` in so many pieces, by `rows` sequences and heads at a time on `room`
// multiprocessors.
inline double walk_cost(int64_t chunks, int64_t pieces, int64_t rows, int64_t room) {
  const auto waves = [&](int64_t blocks) { return static_cast<double>(count_of(blocks, room)); };
  const double length = static_cast<double>(count_of(chunks, pieces)) + kStartCost;
  if (pieces == 1) return waves(rows) * length;
  return (waves(rows * (2 * pieces - 3)) + waves(rows * pieces)) * length +
         static_cast<double>(pieces) * kJoinCost + kLaunchCost;
}

// How many chunks a segment has. A slab's walks last as long as its longest sequence; in a varlen
// call that may be all of it. If it is not, no more is lost than two launches whose blocks return.
inline int64_t choose_segment(const mate_kda_args& args, int64_t slab_chunks) {
#if defined(MATE_GPU_SEGMENT_CHUNKS)
  (void)args, (void)slab_chunks;
  return MATE_GPU_SEGMENT_CHUNKS;
#else
  const int64_t whole = args.cu_seqlens ? slab_chunks : count_of(args.seq_len, kChunk);
  const int64_t longest = whole < slab_chunks ? whole : slab_chunks;
  if (longest <= 0 || args.heads_v <= 0) return 1;
  const int64_t rows = count_of(slab_chunks, longest) * args.heads_v, room = multiprocessors();
  int64_t best = 1;
  double least = walk_cost(longest, 1, rows, room);
  for (int64_t n = 3; n <= longest && n * rows <= kMostSlots; ++n) {
    const double cost = walk_cost(longest, n, rows, room);
    if (cost >= least) continue;
    best = n;
    least = cost;
  }
  return best == 1 ? slab_chunks : count_of(longest, best);
#endif
}

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
         args.algorithm <= MATE_CHUNK && !args.state_indices && !args.token_states.data;
}

// How the chunks are cut, and where everything lies in the workspace.
struct Layout {
  int64_t chunks;       // at most, over all sequences
  int64_t slab_chunks;  // as many at a time
  int64_t segment_chunks, slots;
  int64_t first_chunk, carry, ends, maps, alive, operands, bytes;

  explicit Layout(const mate_kda_args& args) {
    const int64_t per_chunk = args.heads_v * static_cast<int64_t>(sizeof(Operands));
    chunks = args.cu_seqlens ? args.total_tokens / kChunk + args.num_seqs
                             : args.num_seqs * count_of(args.seq_len, kChunk);
    if (args.cu_seqlens && args.total_tokens == 0) chunks = 0;
    slab_chunks = per_chunk ? MATE_GPU_SLAB_BYTES / per_chunk : 0;
    if (slab_chunks < 1) slab_chunks = 1;
    const int64_t slabs = count_of(chunks, slab_chunks);
    if (slabs > 0) slab_chunks = count_of(chunks, slabs);  // all about alike
    if (slab_chunks > chunks) slab_chunks = chunks;
    const auto aligned = [](int64_t x) { return (x + 255) / 256 * 256; };
    const int64_t table =
        aligned(args.cu_seqlens ? (args.num_seqs + 1) * static_cast<int64_t>(sizeof(int64_t)) : 0);
    first_chunk = table;
    carry = 2 * table;
    ends = carry + (chunks > slab_chunks ? 2 * state_elements(args) * 4 : 0);
    segment_chunks = choose_segment(args, slab_chunks);
    slots = 2 * segment_chunks < slab_chunks ? (slab_chunks - 1) / segment_chunks : 0;
    maps = ends + slots * state_elements(args) * 4;
    alive = maps + slots * args.heads_v * kMapSize * 2;
    operands = alive + aligned(slots * args.heads_v * 4);
    bytes = operands + slab_chunks * per_chunk;
  }

  static int64_t state_elements(const mate_kda_args& args) { return args.heads_v * kDim * kDim; }
};

// Whether every row starts at a multiple of 16 bytes. A stride that is never taken may be anything.
inline bool is_aligned(const mate_kda_args& args, const mate_tensor& x, int64_t heads) {
  const int64_t size = x.dtype == MATE_FLOAT32 ? 4 : 2;
  const int64_t counts[] = {args.cu_seqlens ? 1 : args.num_seqs, args.total_tokens, heads};
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    aligned = aligned && (counts[i] <= 1 || x.stride[i] * size % 16 == 0);
  }
  return aligned;
}

template <int32_t kDtype, int kSlice, int kStages>
bool launch_scan(const Params& p, void* stream) {
  const int64_t blocks = (p.slots + p.args.num_seqs) * p.args.heads_v * (kDim / kSlice);
  return launch(scan<kDtype, kSlice, kStages>, blocks, Crew<kSlice>::threads(group_products()),
                static_cast<int>(sizeof(ScanShared<kSlice, kStages>)), stream, p);
}
template <int32_t kDtype, int kSlice>
bool launch_scan(const Params& p, void* stream) {
  const bool two = shared_limit() >= static_cast<int>(sizeof(ScanShared<kSlice, 2>));
  return two ? launch_scan<kDtype, kSlice, 2>(p, stream)
             : launch_scan<kDtype, kSlice, 1>(p, stream);
}

template <int32_t kDtype, int kStages>
bool launch_map(const Params& p, void* stream) {
  return launch(map_segments<kDtype, kStages>, p.slots * p.args.heads_v * 2,
                MapCrew::threads(group_products()),
                static_cast<int>(sizeof(ScanShared<kMapSlice, kStages>)), stream, p);
}

// What must be known before segments are walked side by side.
template <int32_t kDtype>
bool launch_segments(const Params& p, void* stream) {
  const bool two = shared_limit() >= static_cast<int>(sizeof(ScanShared<kMapSlice, 2>));
  if (!(two ? launch_map<kDtype, 2>(p, stream) : launch_map<kDtype, 1>(p, stream))) return false;
  const int64_t shared = static_cast<int64_t>(sizeof(JoinShared)) + p.slots * 4;
  return launch(join_segments, p.args.num_seqs * p.args.heads_v * kJoinBlocks, kJoinThreads,
                static_cast<int>(shared), stream, p);
}

// Wide slices read the operands less often; narrow ones spread few heads over more of the GPU.
template <int32_t kDtype>
bool launch_scan(const Params& p, int slice, void* stream) {
  if (slice == 128) return launch_scan<kDtype, 128>(p, stream);
  if (slice == 64) return launch_scan<kDtype, 64>(p, stream);
  return launch_scan<kDtype, 32>(p, stream);
}

inline int choose_slice(const mate_kda_args& args, int64_t slots) {
  if (slots > 0) return kMapSlice;
  const int64_t heads = args.num_seqs * args.heads_v, room = multiprocessors();
  if (group_products()) return heads * 2 > room ? 128 : 64;
  return heads * 2 > room ? 128 : heads * 4 > room ? 64 : 32;
}

template <int32_t kDtype>
bool launch_slabs(Params p, const Layout& layout, float* carry, void* stream) {
  const int slice = choose_slice(p.args, layout.slots);
  int64_t slab = 0;
  do {  // at least once: empty sequences keep their states
    p.slab_begin = slab * layout.slab_chunks;
    p.slab_end = p.slab_begin + layout.slab_chunks;
    if (p.slab_end > layout.chunks) p.slab_end = layout.chunks;
    // A slab may end the sequence that the one before cut, and cut another.
    p.carry_in = carry + slab % 2 * Layout::state_elements(p.args);
    p.carry_out = carry + (slab + 1) % 2 * Layout::state_elements(p.args);
    const int64_t blocks = (p.slab_end - p.slab_begin) * p.args.heads_v;
    if (blocks > 0 && !launch(prepare<kDtype>, blocks, kPrepareThreads,
                              static_cast<int>(sizeof(PrepareShared)), stream, p)) {
      return false;
    }
    if (p.slots > 0 && !launch_segments<kDtype>(p, stream)) return false;
    if (!launch_scan<kDtype>(p, slice, stream)) return false;
    ++slab;
  } while (slab * layout.slab_chunks < layout.chunks);
  return true;
}

inline bool launch_all(const mate_kda_args& args, char* workspace, void* stream) {
  const Layout layout(args);
  Params p = {};
  p.args = args;
  p.bounds = reinterpret_cast<int64_t*>(workspace);
  p.first_chunk = reinterpret_cast<int64_t*>(workspace + layout.first_chunk);
  p.segment_chunks = layout.segment_chunks > 0 ? layout.segment_chunks : 1;
  p.slots = layout.slots;
  p.ends = reinterpret_cast<float*>(workspace + layout.ends);
  p.maps = reinterpret_cast<uint16_t*>(workspace + layout.maps);
  p.alive = reinterpret_cast<int32_t*>(workspace + layout.alive);
  p.operands = reinterpret_cast<Operands*>(workspace + layout.operands);
  p.group = static_cast<uint32_t>(args.heads_v / args.heads_qk);
  p.contracts = (args.flags & MATE_L2NORM) && (args.flags & MATE_BETA_SIGMOID);
  p.q_aligned = is_aligned(args, args.q, args.heads_qk);
  p.k_aligned = is_aligned(args, args.k, args.heads_qk);
  p.v_aligned = is_aligned(args, args.v, args.heads_v);
  p.g_aligned = is_aligned(args, args.g, args.heads_v);
  p.output_aligned = is_aligned(args, args.output, args.heads_v);
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
  return mate::gpu::serves(*args) ? mate::gpu::Layout(*args).bytes : -1;
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
  if (!launch_all(*args, static_cast<char*>(workspace), stream)) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

MATE_EXPORT const char* mate_gpu_last_error(void) { return mate::gpu::last_error(); }
