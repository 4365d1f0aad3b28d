// How a call is cut into work items, and how many threads it deserves.
#pragma once

#include <vector>

#include "work.h"

namespace mate {

// cu_seqlens made safe: whatever it holds, sequences come out inside [0, total_tokens] and never
// overlap.
std::vector<int64_t> clamped_bounds(const void* cu_seqlens, bool is_64bit, int64_t num_seqs,
                                    int64_t total_tokens);

// The index of sequence n's state, -1 where state_indices give it none.
int64_t state_index(const void* state_indices, bool is_64bit, int64_t num_states, int64_t n);

class Plan {
 public:
  explicit Plan(const mate_kda_args& args);  // throws std::bad_alloc

  int64_t items() const { return items_; }
  WorkItem item(int64_t index) const;
  int threads() const { return threads_; }
  size_t scratch_floats() const { return scratch_floats_; }  // of one thread

 private:
  struct Tokens {
    int64_t batch, begin, end;
  };
  Tokens tokens(int64_t sequence) const;
  bool recurrent(int64_t length) const;
  double cost(int64_t length, int slices) const;
  double cost_of_a_head(int slices) const;
  void order_sequences();
  void choose_cut();
  void size_scratch();

  const mate_kda_args& args_;
  std::vector<int64_t> bounds_;  // of the sequences, if cu_seqlens is given
  std::vector<int64_t> order_;   // sequences, longest first; empty where they are alike
  int64_t longest_ = 0, heads_ = 1, groups_ = 1, items_ = 0;
  int slices_ = 1, threads_ = 1;
  size_t scratch_floats_ = 0;
};

}  // namespace mate
