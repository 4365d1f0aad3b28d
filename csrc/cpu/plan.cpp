#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "team.h"

namespace mate {
namespace {

// Rough times in microseconds (AVX-512, one head): only their ratios matter.
constexpr double kTileShared = 3.0;    // loading and combining 16 tokens, whatever the columns
constexpr double kTileColumns = 10.0;  // their products with 128 columns of state
constexpr double kTokenShared = 0.2;   // the same for one token of the recurrent kernel
constexpr double kTokenColumns = 1.1;
constexpr double kStateCopy = 1.0;

constexpr int kRecurrentUpTo = 12;  // tokens, MATE_AUTO: where the two kernels take the same time

}  // namespace

std::vector<int64_t> clamped_bounds(const void* cu_seqlens, bool is_64bit, int64_t num_seqs,
                                    int64_t total_tokens) {
  std::vector<int64_t> bounds(num_seqs + 1);
  int64_t last = 0;
  for (int64_t i = 0; i <= num_seqs; ++i) {
    const int64_t x = is_64bit ? static_cast<const int64_t*>(cu_seqlens)[i]
                               : static_cast<const int32_t*>(cu_seqlens)[i];
    bounds[i] = last = std::max(last, std::min(x, total_tokens));
  }
  return bounds;
}

int64_t state_index(const void* state_indices, bool is_64bit, int64_t num_states, int64_t n) {
  if (!state_indices) return n;
  const int64_t i = is_64bit ? static_cast<const int64_t*>(state_indices)[n]
                             : static_cast<const int32_t*>(state_indices)[n];
  return i >= 0 && i < num_states ? i : -1;
}

Plan::Plan(const mate_kda_args& args) : args_(args) {
  if (args.num_seqs <= 0 || args.heads_v <= 0) return;
  if (args.cu_seqlens) {
    order_sequences();
  } else {
    longest_ = tokens(0).end;
  }
  const double worth = cost_of_a_head(1) * static_cast<double>(args.heads_v) / kWorthAThread;
  threads_ = std::max(1, static_cast<int>(std::min<double>(args.threads, worth)));
  choose_cut();
  threads_ = static_cast<int>(std::min<int64_t>(threads_, items_));
  size_scratch();
}

Plan::Tokens Plan::tokens(int64_t sequence) const {
  if (!args_.cu_seqlens) return {sequence, 0, std::max<int64_t>(0, args_.seq_len)};
  return {0, bounds_[sequence], bounds_[sequence + 1]};
}

bool Plan::recurrent(int64_t length) const {
  if (length == 0) return false;  // only copies the state
  if (args_.algorithm == MATE_AUTO) return length <= kRecurrentUpTo;
  return args_.algorithm == MATE_RECURRENT;
}

// Of one slice of one head.
double Plan::cost(int64_t length, int slices) const {
  const double n = static_cast<double>(recurrent(length) ? length : divide_up(length, kTile));
  const double shared = recurrent(length) ? kTokenShared : kTileShared;
  const double columns = recurrent(length) ? kTokenColumns : kTileColumns;
  return n * shared + (n * columns + kStateCopy) / slices;
}

// Of one head in every sequence.
double Plan::cost_of_a_head(int slices) const {
  if (!args_.cu_seqlens) {
    return cost(longest_, slices) * slices * static_cast<double>(args_.num_seqs);
  }
  double sum = 0;
  for (int64_t i = 0; i < args_.num_seqs; ++i) {
    sum += cost(bounds_[i + 1] - bounds_[i], slices) * slices;
  }
  return sum;
}

void Plan::order_sequences() {
  bounds_ = clamped_bounds(args_.cu_seqlens, args_.cu_seqlens_is_64bit, args_.num_seqs,
                           args_.total_tokens);
  const auto length = [this](int64_t i) { return bounds_[i + 1] - bounds_[i]; };
  bool alike = true;
  longest_ = 0;
  for (int64_t i = 0; i < args_.num_seqs; ++i) {
    alike = alike && length(i) == length(0);
    longest_ = std::max(longest_, length(i));
  }
  if (alike) return;
  order_.resize(args_.num_seqs);
  std::iota(order_.begin(), order_.end(), int64_t{0});
  std::sort(order_.begin(), order_.end(),
            [&](int64_t a, int64_t b) { return length(a) > length(b); });
}

// Items of many heads read memory in order, but few items leave threads idle at the end: takes the
// cut with the least estimated time.
void Plan::choose_cut() {
  double least = INFINITY;
  for (int slices = 1; slices <= kDim / kColumnQuantum; slices *= 2) {
    const double work = cost_of_a_head(slices) * static_cast<double>(args_.heads_v);
    for (int64_t heads = kMaxHeads; heads >= 1; heads /= 2) {
      const int64_t groups = divide_up(args_.heads_v, heads);
      const int64_t items = groups * slices * args_.num_seqs;
      const double rounds = static_cast<double>(divide_up(items, threads_));
      const double mean = work / static_cast<double>(items);
      const double longest = cost(longest_, slices) * static_cast<double>(heads);
      const double scattered = 1.0 + 0.1 / static_cast<double>(heads);
      const double time = std::max(rounds * mean, longest) * scattered;
      if (time >= 0.97 * least) continue;  // a finer cut must pay
      least = time;
      heads_ = heads;
      groups_ = groups;
      slices_ = slices;
      items_ = items;
    }
  }
}

void Plan::size_scratch() {
  const int64_t rows = static_cast<int64_t>(kDim) * (kDim / slices_);
  const auto need = [&](int64_t length) -> int64_t {
    if (!recurrent(length)) return kSpanFloats + std::min(heads_, args_.heads_v) * rows;
    const int64_t burst = std::min<int64_t>(length, kBurst);
    return burst * kTokenFloats + (length <= kBurst ? kDim * kMaxWidth : rows);
  };
  for (int64_t i = 0; i < (args_.cu_seqlens ? args_.num_seqs : 1); ++i) {
    const Tokens t = tokens(i);
    scratch_floats_ = std::max(scratch_floats_, static_cast<size_t>(need(t.end - t.begin)));
  }
}

WorkItem Plan::item(int64_t index) const {
  const int slice = static_cast<int>(index % slices_);
  const int64_t group = index / slices_ % groups_, rank = index / slices_ / groups_;
  const int64_t sequence = order_.empty() ? rank : order_[rank];
  const Tokens t = tokens(sequence);
  const int columns = kDim / slices_;
  WorkItem x;
  x.state =
      state_index(args_.state_indices, args_.state_indices_is_64bit, args_.num_states, sequence);
  x.batch = t.batch;
  x.begin = t.begin;
  x.end = t.end;
  x.head_begin = group * heads_;
  x.head_end = std::min(x.head_begin + heads_, args_.heads_v);
  x.column_begin = columns * slice;
  x.column_end = columns * (slice + 1);
  x.recurrent = recurrent(t.end - t.begin);
  return x;
}

}  // namespace mate
