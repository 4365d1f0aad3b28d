// Runs one call of the CPU kernels on contiguous tensors from a file: for processors that the tests
// reach only through an emulator, where there is no Python. test_aarch64.py writes and reads the
// files.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mate/kda.h"

namespace {

struct Header {  // what test_aarch64.py packs
  int64_t num_seqs, seq_len, heads_qk, heads_v, has_cu_seqlens, has_state;
  int32_t dtype, gate, flags, algorithm, threads, unused;
  float scale, lower_bound;
};

std::vector<char> read(FILE* file, size_t bytes) {
  std::vector<char> data(bytes);
  if (std::fread(data.data(), 1, bytes, file) != bytes) std::exit(3);
  return data;
}

}  // namespace

int main(int argc, char** argv) {
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
