#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mate {
namespace {

// Rough times in microseconds (AVX-512, one head): only their ratios matter.
constexpr double kTileShared = 3.0;     // loading and combining 16 tokens, whatever the columns
constexpr double kTileColumns = 10.0;   // their products with 128 columns of state
constexpr double kTokenShared = 0.2;    // the same for one token of the recurrent kernel
constexpr double kTokenColumns = 1.1;
constexpr double kStateCopy = 1.0;
constexpr double kWorthAThread = 20.0;  // with less to do, a thread costs more than it brings

constexpr int kRecurrentUpTo = 12;  // tokens, MATE_AUTO: where the two kernels take the same time

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan::Plan(const mate_kda_args& args) : args_(args) {
  if (args.num_seqs <= 0 || args.heads_v <= 0) return;
  longest_ = args.seq_len;
  if (args.cu_seqlens) read_bounds();
  choose_cut();
  size_scratch();
}

Plan::Tokens Plan::tokens(int64_t sequence) const {
  if (bounds_.empty()) return {sequence, 0, args_.seq_len};
  return {0, bounds_[sequence], bounds_[sequence + 1]};
}

bool Plan::recurrent(int64_t length) const {
  if (length == 0) return false;  // only copies the state
  if (args_.algorithm == MATE_AUTO) return length <= kRecurrentUpTo;
  return args_.algorithm == MATE_RECURRENT;
}

double Plan::cost(int64_t length, int slices) const {
  const double n = static_cast<double>(recurrent(length) ? length : divide_up(length, kTile));
  const double shared = recurrent(length) ? kTokenShared : kTileShared;
  const double columns = recurrent(length) ? kTokenColumns : kTileColumns;
  return n * shared + (n * columns + kStateCopy) / slices;
}

// Whatever cu_seqlens holds, sequences come out inside [0, total_tokens] and never overlap.
void Plan::read_bounds() {
  bounds_.resize(args_.num_seqs + 1);
  int64_t last = 0;
  for (int64_t i = 0; i <= args_.num_seqs; ++i) {
    const int64_t x = args_.cu_seqlens_is_64bit ? static_cast<const int64_t*>(args_.cu_seqlens)[i]
                                                : static_cast<const int32_t*>(args_.cu_seqlens)[i];
    bounds_[i] = last = std::max(last, std::min(x, args_.total_tokens));
  }
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

// Many heads an item read memory in order; few items leave threads idle at the end. Takes the cut
// with the least time that the last thread to finish can need.
void Plan::choose_cut() {
  const int64_t limit = std::max<int64_t>(1, args_.threads);
  double least = INFINITY, whole = 0;
  for (int slices = 1; slices <= kDim / kColumnQuantum; slices *= 2) {
    double sequences = 0;  // one head of each
    for (int64_t i = 0; i < args_.num_seqs; ++i) {
      const Tokens t = tokens(i);
      sequences += cost(t.end - t.begin, slices);
      if (bounds_.empty()) {
        sequences *= static_cast<double>(args_.num_seqs);
        break;
      }
    }
    if (slices == 1) whole = sequences * static_cast<double>(args_.heads_v);
    for (int64_t heads = kMaxHeads; heads >= 1; heads /= 2) {
      const int64_t groups = divide_up(args_.heads_v, heads);
      const int64_t items = groups * slices * args_.num_seqs;
      const double slower = 1.0 + 0.1 / static_cast<double>(heads);  // scattered reads
      const double longest = cost(longest_, slices) * static_cast<double>(heads);
      const double mean = sequences * static_cast<double>(args_.heads_v * slices) / items;
      const double rounds = static_cast<double>(divide_up(items, limit));
      const double time = std::max(rounds * mean, longest) * slower;
      if (time >= 0.97 * least) continue;  // finer cuts must pay
      least = time;
      heads_ = heads;
      groups_ = groups;
      slices_ = slices;
      items_ = items;
    }
  }
  const double worth = std::min(whole / kWorthAThread, static_cast<double>(limit));
  threads_ = static_cast<int>(std::max(1.0, std::min(worth, static_cast<double>(items_))));
}

void Plan::size_scratch() {
  const int64_t rows = static_cast<int64_t>(kDim) * (kDim / slices_);
  scratch_floats_ = 0;
  const auto need = [&](int64_t length) -> int64_t {
    if (!recurrent(length)) return std::min(heads_, args_.heads_v) * rows;
    const int64_t burst = std::min<int64_t>(length, kBurst);
    return burst * kTokenFloats + (length <= kBurst ? kDim * kTile : rows);
  };
  for (int64_t i = 0; i < (bounds_.empty() ? 1 : args_.num_seqs); ++i) {
    const Tokens t = tokens(i);
    scratch_floats_ = std::max(scratch_floats_, static_cast<size_t>(need(t.end - t.begin)));
  }
}

WorkItem Plan::item(int64_t index) const {
  const int slice = static_cast<int>(index % slices_);
  const int64_t group = index / slices_ % groups_, rank = index / slices_ / groups_;
  const int64_t sequence = order_.empty() ? rank : order_[rank];
  const Tokens t = tokens(sequence);
  const int64_t first = group * heads_, last = std::min(first + heads_, args_.heads_v);
  const int columns = kDim / slices_;
  return {sequence, t.batch,         t.begin,
          t.end,    first,           last,
          columns * slice, columns * (slice + 1), recurrent(t.end - t.begin)};
}

}  // namespace mate
