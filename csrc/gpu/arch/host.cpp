// Fibres, barriers and asynchronous copies for host.h.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace mate {
namespace gpu {
namespace host {

const Position* here;
char* shared;
int multiprocessors = 4, shared_limit = 227 << 10;
int64_t collectives;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kMaxThreads = 1024, kMaxShared = 227 << 10, kGuard = 4096;
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;  // NaN in every float type; not NaN

struct Copy {
  void* to;
  const void* from;
  int64_t group;
  bool valid;
};

struct Fibre {
  Position position;
  jmp_buf resume;
  ucontext_t start;
  char* stack = nullptr;
  bool started = false;
  int64_t groups = 0;  // asynchronous copies committed so far
  std::vector<Copy> copies;
};

struct Warp {
  void (*body)(void* const*);
  void* lanes[32];
  int arrived;
  std::vector<int> ready;
};

std::mutex one_launch;
Fibre fibres[kMaxThreads];
Warp warps[kMaxThreads / 32];
std::vector<int> ready_warps;  // those with a ready lane
int threads, finished, at_barrier, barrier_site;
bool greedy;  // the same warp goes on as long as it can
int running_warp;
jmp_buf launcher;
void (*thread_body)(const void*);
const void* argument;
char message[256];
uint64_t random_state = 1, seed = 1;
int dropped_site = kNoSite - 1;

uint32_t draw(uint32_t below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * below >> 32);
}

Fibre& self() { return fibres[here->thread]; }

}  // namespace

[[noreturn]] void fail(const char* what, int site) {
  snprintf(message, sizeof(message), "block %lld, thread %d: %s (barrier %d)",
           static_cast<long long>(here->block), here->thread, what, site);
  _longjmp(launcher, 2);
}

namespace {

void make_ready(int thread) {
  Warp& warp = warps[thread / 32];
  if (warp.ready.empty()) ready_warps.push_back(thread / 32);
  warp.ready.push_back(thread);
}

void enter();

// Goes on with some ready fibre; comes back when this one is ready and chosen.
__attribute__((noinline)) void give_way(bool comes_back) {
  if (ready_warps.empty()) {
    if (finished == threads) _longjmp(launcher, 1);
    fail("the others wait for threads that do not come", at_barrier ? barrier_site : kNoSite);
  }
  if (!greedy || warps[running_warp].ready.empty()) {
    running_warp = ready_warps[draw(static_cast<uint32_t>(ready_warps.size()))];
  }
  Warp& warp = warps[running_warp];
  const size_t pick = draw(static_cast<uint32_t>(warp.ready.size()));
  const int next = warp.ready[pick];
  warp.ready[pick] = warp.ready.back();
  warp.ready.pop_back();
  if (warp.ready.empty()) {
    for (size_t i = 0; i < ready_warps.size(); ++i) {
      if (ready_warps[i] != running_warp) continue;
      ready_warps[i] = ready_warps.back();
      ready_warps.pop_back();
      break;
    }
  }
  if (comes_back) {
    if (&fibres[next] == &self()) return;
    if (_setjmp(self().resume)) return;
  }
  Fibre& fibre = fibres[next];
  here = &fibre.position;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

void enter() {
  for (;;) {
    thread_body(argument);
    ++finished;
    self().copies.clear();
    self().groups = 0;
    // Ready again when the next block starts.
    if (!_setjmp(self().resume)) give_way(false);
  }
}

void make_fibre(int i) {
  Fibre& fibre = fibres[i];
  if (!fibre.stack) fibre.stack = static_cast<char*>(malloc(kStack));
  fibre.position.thread = i;
  fibre.started = false;
  fibre.groups = 0;
  fibre.copies.clear();
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack;
  fibre.start.uc_stack.ss_size = kStack;
  fibre.start.uc_link = nullptr;
  makecontext(&fibre.start, enter, 0);
}

bool run_block(int64_t block) {
  finished = at_barrier = 0;
  ready_warps.clear();
  for (int w = 0; w < kMaxThreads / 32; ++w) {
    warps[w].ready.clear();
    warps[w].arrived = 0;
  }
  for (int i = 0; i < threads; ++i) {
    fibres[i].position.block = block;
    make_ready(i);
  }
  greedy = draw(2);
  running_warp = 0;
  here = &fibres[0].position;
  const int result = _setjmp(launcher);
  if (result == 0) give_way(false);
  return result == 1;
}

}  // namespace

void block_barrier(int site) {
  if (site == dropped_site) return;
  if (at_barrier == 0) barrier_site = site;
  if (site != barrier_site) fail("threads of a block are at different barriers", site);
  if (++at_barrier < threads) return give_way(true);
  at_barrier = 0;
  for (int i = 0; i < threads; ++i) {
    if (i != here->thread) make_ready(i);
  }
}

void collective(void (*body)(void* const*), void* mine) {
  Warp& warp = warps[here->thread / 32];
  if (warp.arrived == 0) warp.body = body;
  if (warp.body != body) fail("lanes of a warp are at different operations");
  warp.lanes[here->thread % 32] = mine;
  if (++warp.arrived < 32) return give_way(true);
  warp.arrived = 0;
  ++collectives;
  body(warp.lanes);
  for (int i = here->thread / 32 * 32, end = i + 32; i < end; ++i) {
    if (i != here->thread) make_ready(i);
  }
}

void warp_barrier(int site) {
  if (site != dropped_site) collective([](void* const*) {}, nullptr);
}

void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("a copy's target is not aligned");
  if (valid && reinterpret_cast<uintptr_t>(from) % 16) fail("a copy's source is not aligned");
  memset(to, kPoison, 16);
  self().copies.push_back({to, from, self().groups, valid});
}

void copy_commit() { ++self().groups; }

void copy_wait(int groups_in_flight) {
  std::vector<Copy>& copies = self().copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= self().groups - groups_in_flight) {
      copies[kept++] = copy;
    } else if (copy.valid) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  copies.resize(kept);
}

bool run(void (*body)(const void*), const void* with, int64_t blocks, int block_threads,
         int shared_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  message[0] = 0;
  if (block_threads > kMaxThreads || block_threads % 32 || shared_bytes > shared_limit ||
      blocks > INT32_MAX) {
    snprintf(message, sizeof(message), "a launch of %lld x %d threads with %d bytes is too large",
             static_cast<long long>(blocks), block_threads, shared_bytes);
    return false;
  }
  alignas(1024) static char memory[kGuard + kMaxShared + kGuard];
  shared = memory + kGuard;
  threads = block_threads;
  thread_body = body;
  argument = with;
  for (int i = 0; i < threads; ++i) make_fibre(i);
  random_state = seed * 0x9e3779b97f4a7c15u + 1;
  // A block in the order of a full-period generator: any order is allowed.
  const int64_t first = blocks ? draw(static_cast<uint32_t>(blocks)) : 0;
  const bool backwards = draw(2);
  memset(memory, kCanary, sizeof(memory));
  for (int64_t i = 0; i < blocks; ++i) {
    memset(shared, kPoison, shared_bytes);
    const int64_t block = (first + (backwards ? blocks - i : i)) % blocks;
    if (!run_block(block)) return false;
    for (int j = 0; j < kGuard; ++j) {
      if (static_cast<unsigned char>(memory[j]) != kCanary ||
          static_cast<unsigned char>(shared[shared_bytes + j]) != kCanary) {
        snprintf(message, sizeof(message), "block %lld wrote outside its shared memory",
                 static_cast<long long>(block));
        return false;
      }
    }
  }
  return true;
}

const char* error() { return message; }

}  // namespace host
}  // namespace gpu
}  // namespace mate

// ---- for tests ----------------------------------------------------------------------------------

#define MATE_EXPORT extern "C" __attribute__((visibility("default")))

// The order in which fibres run.
MATE_EXPORT void mate_gpu_host_seed(uint64_t seed) { mate::gpu::host::seed = seed; }

// Another GPU's size: multiprocessors; blocks may use as many bytes of shared memory.
MATE_EXPORT void mate_gpu_host_multiprocessors(int count) {
  mate::gpu::host::multiprocessors = count;
}
MATE_EXPORT void mate_gpu_host_shared_limit(int bytes) { mate::gpu::host::shared_limit = bytes; }

// Operations of whole warps until now: how much work there was.
MATE_EXPORT int64_t mate_gpu_host_operations(void) { return mate::gpu::host::collectives; }

// Leaves out every barrier of one site of the source; negative: none.
MATE_EXPORT void mate_gpu_host_drop_barrier(int site) {
  mate::gpu::host::dropped_site = site < 0 ? mate::gpu::host::kNoSite - 1 : site;
}
