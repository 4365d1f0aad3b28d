// Runs the CPU kernels where the tests have no Python: on processors reached through an emulator,
// and under ThreadSanitizer.
//
//   kda_runner IN OUT   one forward call on contiguous tensors; test_runner.py has the files'
//   format kda_runner THREADS  some decode steps, which must give what one thread gives
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "mate/layer.h"

namespace {

struct Header {  // what test_runner.py packs
  int64_t num_seqs, seq_len, heads_qk, heads_v, has_cu_seqlens, has_state;
  int32_t dtype, gate, flags, algorithm, threads, unused;
  float scale, lower_bound;
};

std::vector<char> read(FILE* file, size_t bytes) {
  std::vector<char> data(bytes);
  if (std::fread(data.data(), 1, bytes, file) != bytes) std::exit(3);
  return data;
}

// Three steps of a layer whose 5 value heads share each q and k head.
std::vector<float> decode(int threads) {
  constexpr int64_t kBatch = 3, kHeadsQk = 2, kHeadsV = 10, D = MATE_HEAD_DIM, kWidth = 4;
  constexpr int64_t keys = kHeadsQk * D, values = kHeadsV * D, channels = 2 * keys + values;
  uint32_t seed = 1;
  const auto draw = [&seed](int64_t count) {
    std::vector<float> x(count);
    for (float& y : x) y = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 1e-7f;
    return x;
  };
  auto q = draw(kBatch * keys), k = draw(kBatch * keys), v = draw(kBatch * values);
  auto g = draw(kBatch * values), beta = draw(kBatch * kHeadsV), gate = draw(kBatch * values);
  auto q_weight = draw(keys * kWidth), k_weight = draw(keys * kWidth);
  auto v_weight = draw(values * kWidth), norm = draw(D);
  auto A_log = draw(kHeadsV), dt_bias = draw(values);
  auto windows = draw(kBatch * channels * kWidth), state = draw(kBatch * kHeadsV * D * D);
  std::vector<float> output(kBatch * values);
  const auto rows = [](std::vector<float>& x, int64_t stride) {
    return mate_rows{x.data(), stride, MATE_FLOAT32};
  };
  mate_decode_args args = {};
  args.q = rows(q, keys);
  args.k = rows(k, keys);
  args.v = rows(v, values);
  args.g = rows(g, values);
  args.beta = rows(beta, kHeadsV);
  args.output_gate = rows(gate, values);
  args.output = rows(output, values);
  args.conv_state = rows(windows, channels * kWidth);
  args.q_weight = rows(q_weight, 0);
  args.k_weight = rows(k_weight, 0);
  args.v_weight = rows(v_weight, 0);
  args.norm_weight = rows(norm, 0);
  args.state = {state.data(), {kHeadsV * D * D, D * D, D}, MATE_FLOAT32};
  args.A_log = A_log.data();
  args.dt_bias = dt_bias.data();
  args.batch = kBatch;
  args.heads_qk = kHeadsQk;
  args.heads_v = kHeadsV;
  args.scale = 0.1f;
  args.lower_bound = -5.0f;
  args.norm_eps = 1e-5f;
  args.width = kWidth;
  args.gate = MATE_GATE_BOUNDED;
  args.flags = MATE_L2NORM | MATE_BETA_SIGMOID | MATE_STATE_V_FIRST;
  args.threads = threads;
  for (int step = 0; step < 3; ++step) {
    if (mate_decode_step(&args) != MATE_OK) std::exit(4);
  }
  for (const auto* x : {&windows, &state}) output.insert(output.end(), x->begin(), x->end());
  return output;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) {
    const std::vector<float> one = decode(1), many = decode(std::atoi(argv[1]));
    return std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0 ? 0 : 5;
  }
  if (argc != 3) return 2;
  FILE* in = std::fopen(argv[1], "rb");
  Header h;
  if (!in || std::fread(&h, sizeof(h), 1, in) != 1) return 3;
  const int64_t rows = h.has_cu_seqlens ? 1 : h.num_seqs, D = MATE_HEAD_DIM;
  const size_t size = h.dtype == MATE_FLOAT32 ? 4 : 2;
  const size_t tokens = rows * h.seq_len, state_floats = h.num_seqs * h.heads_v * D * D;
  auto q = read(in, tokens * h.heads_qk * D * size), k = read(in, q.size());
  auto v = read(in, tokens * h.heads_v * D * size), g = read(in, v.size());
  auto beta = read(in, tokens * h.heads_v * size);
  auto A_log = read(in, h.gate ? h.heads_v * 4 : 0);
  auto dt_bias = read(in, h.gate ? h.heads_v * D * 4 : 0);
  auto cu_seqlens = read(in, h.has_cu_seqlens ? (h.num_seqs + 1) * 8 : 0);
  auto state = read(in, h.has_state ? state_floats * 4 : 0);
  std::vector<char> output(v.size(), char(0xff)), final_state(state_floats * 4, char(0xff));  // NaN

  auto tensor = [&](std::vector<char>& x, int64_t heads, int64_t width) {
    return mate_tensor{x.data(), {h.seq_len * heads * width, heads * width, width}, h.dtype};
  };
  auto state_tensor = [&](std::vector<char>& x) {
    return mate_tensor{x.empty() ? nullptr : x.data(), {h.heads_v * D * D, D * D, D}, MATE_FLOAT32};
  };
  mate_kda_args args = {};
  args.q = tensor(q, h.heads_qk, D);
  args.k = tensor(k, h.heads_qk, D);
  args.v = tensor(v, h.heads_v, D);
  args.g = tensor(g, h.heads_v, D);
  args.beta = tensor(beta, h.heads_v, 1);
  args.output = tensor(output, h.heads_v, D);
  args.initial_state = state_tensor(state);
  args.final_state = state_tensor(final_state);
  args.A_log = h.gate ? reinterpret_cast<float*>(A_log.data()) : nullptr;
  args.dt_bias = h.gate ? reinterpret_cast<float*>(dt_bias.data()) : nullptr;
  args.cu_seqlens = h.has_cu_seqlens ? cu_seqlens.data() : nullptr;
  args.cu_seqlens_is_64bit = 1;
  args.num_seqs = h.num_seqs;
  args.seq_len = args.total_tokens = h.seq_len;
  args.heads_qk = h.heads_qk;
  args.heads_v = h.heads_v;
  args.scale = h.scale;
  args.lower_bound = h.lower_bound;
  args.gate = h.gate;
  args.flags = h.flags;
  args.algorithm = h.algorithm;
  args.threads = h.threads;
  if (mate_kda_forward(&args) != MATE_OK) return 4;

  FILE* out = std::fopen(argv[2], "wb");
  std::fwrite(output.data(), 1, output.size(), out);
  std::fwrite(final_state.data(), 1, final_state.size(), out);
  std::fclose(out);
  std::puts(mate_cpu_isa());
  return 0;
}
