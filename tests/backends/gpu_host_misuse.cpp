// Kernels that misuse the machine, one by name: the emulated GPU must say so.
#include <cstdio>
#include <string>

#include "arch/arch.h"

using namespace mate::gpu;

namespace {

struct Nothing {};

void skipped_barrier(Nothing) {
  if (thread_index() != 5) MATE_BARRIER();
}

void two_barriers(Nothing) {
  if (thread_index() < 32) {
    MATE_BARRIER();
  } else {
    MATE_BARRIER();
  }
}

void two_operations(Nothing) {
  if (lane_index() < 16) {
    MATE_WARP_BARRIER();
  } else {
    shuffle_xor(1.0f, 1);
  }
}

void missing_lane(Nothing) {
  if (lane_index() != 3) shuffle_xor(1.0f, 1);
}

void outside_shared(Nothing) {
  shared_memory()[64 + thread_index() / 63] = 0;  // the last threads: one byte too far
}

void misaligned_copy(Nothing) {
  alignas(16) static char from[16];
  copy_async(shared_memory() + 8, from);
}

void none(Nothing) {
  float* numbers = reinterpret_cast<float*>(shared_memory());
  alignas(16) static const float from[4] = {1, 2, 3, 4};
  if (thread_index() == 0) {
    copy_async(numbers, from);
    copy_commit();
    if (numbers[1] == numbers[1]) printf("there before the wait");
    copy_wait<0>();
  }
  MATE_BARRIER();
  if (numbers[1] != 2) printf("not there after the wait");
  const float lane = static_cast<float>(lane_index());
  if (shuffle_xor(lane, 5) != static_cast<float>(lane_index() ^ 5)) printf("wrong shuffle");
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  void (*kernel)(Nothing) = none;
  if (name == "skipped-barrier") kernel = skipped_barrier;
  if (name == "two-barriers") kernel = two_barriers;
  if (name == "two-operations") kernel = two_operations;
  if (name == "missing-lane") kernel = missing_lane;
  if (name == "outside-shared") kernel = outside_shared;
  if (name == "misaligned-copy") kernel = misaligned_copy;
  const int shared_bytes = name == "too-much-shared" ? 228 << 10 : 64;
  if (!launch(kernel, 3, 64, shared_bytes, nullptr, Nothing{})) printf("%s", last_error());
  // and the next launch is none the worse
  if (!launch(none, 3, 64, 64, nullptr, Nothing{})) printf("then: %s", last_error());
}
