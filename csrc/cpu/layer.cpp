// The C interface of mate/layer.h: argument codes, and how calls are cut into work.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "plan.h"
#include "team.h"

namespace mate {
namespace {

// Rough times in microseconds, of which only the ratio to a thread's cost matters.
constexpr double kConvElement = 4e-4;
constexpr double kNormElement = 4e-4;
constexpr double kDecodeHead = 3.0;

constexpr int64_t kConvItemTokens = 64, kConvItemChannels = 1024;
constexpr int64_t kNormItemElements = 8192;

// As many threads as the work is worth and the caller grants.
int worth_threads(int64_t items, int32_t threads, double microseconds) {
  const int64_t most = std::min<int64_t>(threads, items);
  const double worth = std::min<double>(static_cast<double>(most), microseconds / kWorthAThread);
  return std::max(1, static_cast<int>(worth));
}

bool known_dtype(int32_t dtype) { return dtype >= MATE_FLOAT32 && dtype <= MATE_BFLOAT16; }

bool known_width(int32_t width) { return width >= 1 && width <= MATE_MAX_CONV_WIDTH; }

// ---- short convolution --------------------------------------------------------------------------

bool known_codes(const mate_short_conv_args& args) {
  for (const mate_tensor* state : {&args.initial_state, &args.final_state}) {
    if (state->data && state->dtype != args.x.dtype) return false;
  }
  return known_width(args.width) && known_dtype(args.x.dtype) && known_dtype(args.y.dtype) &&
         known_dtype(args.weight.dtype);
}

std::vector<ConvItem> conv_items(const mate_short_conv_args& args) {
  std::vector<ConvItem> items;
  std::vector<int64_t> bounds;
  if (args.cu_seqlens) {
    bounds =
        clamped_bounds(args.cu_seqlens, args.cu_seqlens_is_64bit, args.num_seqs, args.total_tokens);
  }
  for (int64_t n = 0; n < args.num_seqs; ++n) {
    ConvItem item = {};
    item.sequence = n;
    item.batch = args.cu_seqlens ? 0 : n;
    item.begin = args.cu_seqlens ? bounds[n] : 0;
    item.end = args.cu_seqlens ? bounds[n + 1] : args.seq_len;
    item.from = item.begin;
    do {  // an empty document still has a final state
      item.to = std::min(item.end, item.from + kConvItemTokens);
      items.push_back(item);
      item.from = item.to;
    } while (item.from < item.end);
  }
  return items;
}

void short_conv(const mate_short_conv_args& args) {
  const std::vector<ConvItem> blocks = conv_items(args);
  const int64_t groups = divide_up(args.channels, kConvItemChannels);
  const auto run = [&, kernel = current_layer_kernels().short_conv](int64_t i, int) {
    ConvItem item = blocks[i / groups];
    item.channel_begin = i % groups * kConvItemChannels;
    item.channel_end = std::min(args.channels, item.channel_begin + kConvItemChannels);
    kernel(args, item);
  };
  const int64_t tokens = args.cu_seqlens ? args.total_tokens : args.num_seqs * args.seq_len;
  const double cost = static_cast<double>(tokens * args.channels) * kConvElement;
  const int64_t items = static_cast<int64_t>(blocks.size()) * groups;
  run_items(items, worth_threads(items, args.threads, cost), run);
}

// ---- gated norm ---------------------------------------------------------------------------------

bool known_codes(const mate_gated_norm_args& args) {
  return known_dtype(args.x.dtype) && known_dtype(args.gate.dtype) &&
         known_dtype(args.output.dtype) && known_dtype(args.weight.dtype);
}

void gated_norm(const mate_gated_norm_args& args) {
  const int64_t rows = args.size[0] * args.size[1] * args.size[2];
  if (rows <= 0 || args.dim <= 0) return;
  const int64_t share = std::max<int64_t>(1, kNormItemElements / args.dim);
  const auto run = [&, kernel = current_layer_kernels().gated_norm](int64_t i, int) {
    kernel(args, i * share, std::min(rows, (i + 1) * share));
  };
  const double cost = static_cast<double>(rows * args.dim) * kNormElement;
  const int64_t items = divide_up(rows, share);
  run_items(items, worth_threads(items, args.threads, cost), run);
}

// ---- a decode step ------------------------------------------------------------------------------

bool known_codes(const mate_decode_args& args) {
  for (const mate_rows* x : {&args.q, &args.k, &args.v}) {
    if (x->dtype != args.conv_state.dtype) return false;
  }
  for (const mate_rows* x : {&args.conv_state, &args.g, &args.beta, &args.output_gate, &args.output,
                             &args.q_weight, &args.k_weight, &args.v_weight, &args.norm_weight}) {
    if (!known_dtype(x->dtype)) return false;
  }
  const bool gate_complete = args.gate == MATE_GATE_LOG_DECAY || (args.A_log && args.dt_bias);
  return known_width(args.width) && known_dtype(args.state.dtype) &&
         args.gate >= MATE_GATE_LOG_DECAY && args.gate <= MATE_GATE_SOFTPLUS && gate_complete &&
         args.heads_qk > 0 && args.heads_v > 0 && args.heads_v % args.heads_qk == 0;
}

void decode_step(const mate_decode_args& args) {
  const LayerKernels& kernels = current_layer_kernels();
  const int64_t group = args.heads_v / args.heads_qk;
  // Value heads that share a q and k head may meet in time: the last one to finish moves the
  // windows on, which all of them have read.
  const std::unique_ptr<std::atomic<int64_t>[]> done(
      group > 1 ? new std::atomic<int64_t>[args.batch * args.heads_qk]() : nullptr);
  const auto run = [&](int64_t i, int) {
    const int64_t batch = i / args.heads_v, head = i % args.heads_v, head_qk = head / group;
    const DecodeRow row = {batch, state_index(args.state_indices, args.state_indices_is_64bit,
                                              args.num_states, batch)};
    kernels.decode(args, row, head);
    if (done && done[batch * args.heads_qk + head_qk].fetch_add(1) + 1 < group) return;
    kernels.advance_qk(args, row, head_qk);
  };
  const int64_t items = args.batch * args.heads_v;
  const double cost = static_cast<double>(items) * kDecodeHead;
  run_items(items, worth_threads(items, args.threads, cost), run);
}

template <typename Args>
int32_t checked(const Args& args, void (*run)(const Args&)) {
  if (!known_codes(args)) return MATE_UNSUPPORTED;
  try {
    run(args);
  } catch (const std::exception&) {  // std::bad_alloc, before anything is written
    return MATE_OUT_OF_MEMORY;
  }
  return MATE_OK;
}

}  // namespace
}  // namespace mate

MATE_EXPORT int32_t mate_short_conv(const mate_short_conv_args* args) {
  return mate::checked(*args, mate::short_conv);
}

MATE_EXPORT int32_t mate_gated_norm(const mate_gated_norm_args* args) {
  return mate::checked(*args, mate::gated_norm);
}

MATE_EXPORT int32_t mate_decode_step(const mate_decode_args* args) {
  if (args->batch <= 0) return MATE_OK;
  return mate::checked(*args, mate::decode_step);
}
