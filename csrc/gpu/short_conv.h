// The short convolution in front of q, k and v. A thread takes 16 bytes of channels through a run
// of tokens: what it has read of a token stays in registers while it is needed. Further blocks
// write the windows that the next call starts from.
#pragma once

#include "decode.h"
#include "load.h"

namespace mate {
namespace gpu {

constexpr int kConvThreads = 128;
constexpr int kConvStep = 4;  // tokens asked for at a time, with the usual width

struct ConvParams {
  mate_short_conv_args args;
  int64_t run, runs;  // tokens of a thread; runs of a row of the batch
  uint32_t groups;    // blocks side by side over the channels
  int64_t conv_blocks;
  bool x_aligned, y_aligned;  // pieces are whole, and at multiples of 16 bytes
};

constexpr int kUsualWidth = 4;

// Channels of a thread. kTaps is the width, or the most that a width may be.
template <int32_t kDtype, int kTaps>
struct ConvThread {
  static constexpr int kSize = kDtype == MATE_FLOAT32 ? 4 : 2, kChannels = 16 / kSize;
  const ConvParams& p;
  int64_t batch, channel;
  float taps[kTaps][kChannels], past[kTaps - 1][kChannels];  // oldest first

  MATE_DEVICE ConvThread(const ConvParams& p, int64_t batch, int64_t channel)
      : p(p), batch(batch), channel(channel) {}

  static constexpr bool kUsual = kTaps == kUsualWidth;

  MATE_DEVICE int width() const { return kUsual ? kTaps : p.args.width; }
  MATE_DEVICE bool used(int tap) const { return tap >= kTaps - width(); }
  MATE_DEVICE static bool weight_aligned() { return kUsual; }
  MATE_DEVICE bool x_aligned() const { return kUsual || p.x_aligned; }
  MATE_DEVICE bool y_aligned() const { return kUsual || p.y_aligned; }
  MATE_DEVICE bool exists(int c) const { return kUsual || channel + c < p.args.channels; }

  MATE_DEVICE const char* x_at(int64_t token) const {
    return row_at(p.args.x, batch, token, 0) + channel * kSize;
  }
  MATE_DEVICE char* y_at(int64_t token) const {
    return row_at(p.args.y, batch, token, 0) + channel * kSize;
  }
  MATE_DEVICE Eight load(const char* from) const {
    if (x_aligned()) return *reinterpret_cast<const Eight*>(from);
    Eight raw = {};
    MATE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (exists(c)) raw.x[c * kSize / 4] |= load_bits(from, c, kDtype) << c * kSize % 4 * 8;
    }
    return raw;
  }
  MATE_DEVICE void store(char* to, const Eight& raw) const {
    if (y_aligned()) {
      *reinterpret_cast<Eight*>(to) = raw;
      return;
    }
    MATE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (exists(c)) store_bits(to, c, kDtype, raw.x[c * kSize / 4] >> c * kSize % 4 * 8);
    }
  }
  MATE_DEVICE static float number(const Eight& raw, int c) {
    const uint32_t bits = raw.x[c * kSize / 4];
    if (kSize == 4) return from_bits(bits);
    return from_16_bits<kDtype>(c % 2 ? bits >> 16 : bits & 0xffffu);
  }

  MATE_DEVICE void load_taps() {
    const mate_rows& weight = p.args.weight;
    const char* from =
        static_cast<const char*>(weight.data) + channel * width() * element_size(weight.dtype);
    if (weight_aligned()) {
      const Eight* pieces = reinterpret_cast<const Eight*>(from);
      const auto tap = [&](int i) -> float& { return taps[i % kTaps][i / kTaps]; };
      if (weight.dtype == MATE_FLOAT32) {
        MATE_UNROLL
        for (int i = 0; i < kChannels * kTaps; i += 4) {
          const Eight four = pieces[i / 4];
          MATE_UNROLL
          for (int w = 0; w < 4; ++w) tap(i + w) = from_bits(four.x[w]);
        }
      } else {
        MATE_UNROLL
        for (int i = 0; i < kChannels * kTaps; i += 8) {
          const Eight eight = pieces[i / 8];
          MATE_UNROLL
          for (int w = 0; w < 4; ++w) {
            tap(i + 2 * w) = to_float(eight.x[w] & 0xffffu, weight.dtype);
            tap(i + 2 * w + 1) = to_float(eight.x[w] >> 16, weight.dtype);
          }
        }
      }
      return;
    }
    MATE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      MATE_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        const int i = c * width() + j - (kTaps - width());
        taps[j][c] = used(j) && exists(c) ? load_element(from, i, weight.dtype) : 0.0f;
      }
    }
  }

  // What comes before `token` in a sequence that began at `begin`.
  MATE_DEVICE void load_past(int64_t token, int64_t sequence, int64_t begin) {
    const mate_tensor& state = p.args.initial_state;
    MATE_UNROLL
    for (int j = 0; j < kTaps - 1; ++j) {
      const int64_t from = token - (kTaps - 1) + j;
      if (!used(j)) continue;
      if (from >= begin) {
        const Eight raw = load(x_at(from));
        MATE_UNROLL
        for (int c = 0; c < kChannels; ++c) past[j][c] = number(raw, c);
      } else {
        const int64_t tap = width() + from - begin;
        MATE_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          const bool there = state.data && exists(c);
          past[j][c] =
              there ? load_element(row_at(state, sequence, channel + c, tap), 0, kDtype) : 0.0f;
        }
      }
    }
  }

  // The output at a token, which becomes the newest of the past.
  MATE_DEVICE Eight convolve(const Eight& raw) {
    float y[kChannels];
    MATE_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const float x = number(raw, c);
      float sum = taps[kTaps - 1][c] * x;
      MATE_UNROLL
      for (int j = 0; j < kTaps - 1; ++j) {
        if (used(j)) sum += taps[j][c] * past[j][c];
      }
      y[c] = sum * sigmoid(sum);
      MATE_UNROLL
      for (int j = 0; j < kTaps - 2; ++j) past[j][c] = past[j + 1][c];
      past[kTaps - 2][c] = x;
    }
    Eight out;
    MATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      out.x[i] = kSize == 4 ? to_bits(y[i])
                            : pack<kDtype>(y[i * 2 % kChannels], y[(i * 2 + 1) % kChannels]);
    }
    return out;
  }
};

// The sequence that a token belongs to, going from token to token.
struct ConvPlace {
  int64_t sequence, begin;  // the latter beyond the token: it belongs to none
  int64_t next;             // the token at which this changes

  MATE_DEVICE ConvPlace(const mate_short_conv_args& a, int64_t batch, int64_t token) {
    sequence = batch;
    begin = 0;
    next = INT64_MAX;
    if (!a.cu_seqlens) return;
    int64_t low = 0, high = a.num_seqs;  // the first one that ends beyond the token
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (clamped_bound(a, middle + 1) > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    sequence = low;
    find(a, token);
  }
  MATE_DEVICE void find(const mate_short_conv_args& a, int64_t token) {
    while (sequence < a.num_seqs && clamped_bound(a, sequence + 1) <= token) ++sequence;
    begin = next = INT64_MAX;
    if (sequence >= a.num_seqs) return;
    begin = clamped_bound(a, sequence);
    next = begin <= token ? clamped_bound(a, sequence + 1) : begin;
  }
};

// The last inputs of a sequence, bit by bit.
template <int32_t kDtype>
MATE_DEVICE void store_windows(const ConvParams& p, int64_t n, int64_t channel, int channels) {
  const mate_short_conv_args& a = p.args;
  const int64_t batch = a.cu_seqlens ? 0 : n;
  const int64_t begin = a.cu_seqlens ? clamped_bound(a, n) : 0;
  const int64_t end = a.cu_seqlens ? larger(begin, clamped_bound(a, n + 1)) : a.seq_len;
  MATE_NO_UNROLL
  for (int i = 0; i < channels * a.width; ++i) {
    const int64_t at = channel + i / a.width, token = end - a.width + i % a.width;
    if (at >= a.channels) return;
    uint32_t bits = 0;
    if (token >= begin) {
      bits = load_bits(row_at(a.x, batch, token, 0), static_cast<int>(at), kDtype);
    } else if (a.initial_state.data) {
      bits = load_bits(row_at(a.initial_state, n, at, a.width + token - begin), 0, kDtype);
    }
    store_bits(row_at(a.final_state, n, at, i % a.width), 0, kDtype, bits);
  }
}

template <int32_t kDtype, int kTaps>
MATE_KERNEL(kConvThreads, kTaps == kUsualWidth ? 4 : 2)
short_conv(const ConvParams p) {
  using Thread = ConvThread<kDtype, kTaps>;
  constexpr int kStep = Thread::kUsual ? kConvStep : 1;
  const mate_short_conv_args& a = p.args;
  const int64_t block = block_index();
  const bool convolves = block < p.conv_blocks;
  const uint32_t among = static_cast<uint32_t>(convolves ? block : block - p.conv_blocks);
  const uint32_t part = among / p.groups, group = among - part * p.groups;
  const int64_t channel =
      (static_cast<int64_t>(group) * kConvThreads + thread_index()) * Thread::kChannels;
  if (channel >= a.channels) return;
  if (!convolves) {
    store_windows<kDtype>(p, part, channel, Thread::kChannels);
    return;
  }
  const uint32_t runs = static_cast<uint32_t>(p.runs), batch = part / runs;
  const int64_t from = (part - batch * runs) * p.run;
  const int64_t to = from + p.run < a.seq_len ? from + p.run : a.seq_len;
  Thread thread(p, batch, channel);
  thread.load_taps();
  ConvPlace place(a, batch, from);
  MATE_NO_UNROLL
  for (int64_t token = from; token < to;) {  // a sequence at a time
    const int64_t end = place.next < to ? place.next : to;
    const char* x = thread.x_at(token);
    char* y = thread.y_at(token);
    const int64_t x_step = a.x.stride[1] * Thread::kSize, y_step = a.y.stride[1] * Thread::kSize;
    int left = static_cast<int>(end - token);
    if (place.begin > token) {
      for (; left > 0; --left, y += y_step) thread.store(y, Eight{});
    } else {
      thread.load_past(token, place.sequence, place.begin);
      MATE_NO_UNROLL
      for (; left >= kStep; left -= kStep) {
        Eight raw[kStep];
        MATE_UNROLL
        for (int i = 0; i < kStep; ++i, x += x_step) raw[i] = thread.load(x);
        MATE_UNROLL
        for (int i = 0; i < kStep; ++i, y += y_step) thread.store(y, thread.convolve(raw[i]));
      }
      MATE_NO_UNROLL
      for (; left > 0; --left, x += x_step, y += y_step) {
        thread.store(y, thread.convolve(thread.load(x)));
      }
    }
    token = end;
    if (token < to) place.find(a, token);
  }
}

// ---- launching ----------------------------------------------------------------------------------

inline bool serves_short_conv(const mate_short_conv_args& a) {
  const auto state = [&](const mate_tensor& x) { return !x.data || x.dtype == a.x.dtype; };
  return known_dtype(a.x.dtype) && a.y.dtype == a.x.dtype && known_dtype(a.weight.dtype) &&
         state(a.initial_state) && state(a.final_state) && a.width >= 1 &&
         a.width <= kMaxConvWidth && a.num_seqs >= 0 && a.seq_len >= 0 && a.total_tokens >= 0 &&
         a.channels >= 0;
}

inline bool pieces_aligned(const mate_short_conv_args& a, const mate_tensor& x) {
  const int64_t size = x.dtype == MATE_FLOAT32 ? 4 : 2;
  return a.channels * size % 16 == 0 &&
         rows_aligned(x, a.cu_seqlens ? 1 : a.num_seqs, a.seq_len, 1);
}

template <int32_t kDtype>
bool launch_short_conv(const ConvParams& p, int64_t blocks, void* stream) {
  const bool usual = p.args.width == kUsualWidth && p.x_aligned && p.y_aligned &&
                     reinterpret_cast<uintptr_t>(p.args.weight.data) % 16 == 0;
  const auto kernel = usual ? short_conv<kDtype, kUsualWidth> : short_conv<kDtype, kMaxConvWidth>;
  return launch(kernel, blocks, kConvThreads, 0, stream, p);
}

inline int32_t run_short_conv(const mate_short_conv_args& args, void* stream) {
  if (!serves_short_conv(args)) return MATE_UNSUPPORTED;
  ConvParams p = {};
  p.args = args;
  const int64_t batch = args.cu_seqlens ? 1 : args.num_seqs;
  if (args.cu_seqlens) p.args.seq_len = args.total_tokens;
  const int64_t per_block = kConvThreads * (args.x.dtype == MATE_FLOAT32 ? 4 : 8);
  const int64_t groups = (args.channels + per_block - 1) / per_block;
  // Long runs read less twice, short ones fill the GPU.
  for (p.run = 64; p.run > kConvStep; p.run /= 2) {
    p.runs = (p.args.seq_len + p.run - 1) / p.run;
    if (batch * p.runs * groups >= 6 * multiprocessors()) break;
  }
  p.runs = (p.args.seq_len + p.run - 1) / p.run;
  p.groups = static_cast<uint32_t>(groups);
  p.conv_blocks = batch * p.runs * groups;
  const int64_t blocks = p.conv_blocks + (args.final_state.data ? args.num_seqs * groups : 0);
  if (blocks > INT32_MAX) return MATE_UNSUPPORTED;
  if (blocks == 0) return MATE_OK;
  p.x_aligned = pieces_aligned(p.args, args.x);
  p.y_aligned = pieces_aligned(p.args, args.y);
  const int32_t dtype = args.x.dtype;
  const bool launched = dtype == MATE_FLOAT32 ? launch_short_conv<MATE_FLOAT32>(p, blocks, stream)
                        : dtype == MATE_FLOAT16
                            ? launch_short_conv<MATE_FLOAT16>(p, blocks, stream)
                            : launch_short_conv<MATE_BFLOAT16>(p, blocks, stream);
  if (!launched) return MATE_LAUNCH_FAILED;
  return MATE_OK;
}

}  // namespace gpu
}  // namespace mate

MATE_EXPORT int32_t mate_gpu_short_conv(const mate_short_conv_args* args, void* stream) {
  return mate::gpu::run_short_conv(*args, stream);
}
