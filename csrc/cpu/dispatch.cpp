// The C interface: argument codes, the choice of instruction set, threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "plan.h"
#include "team.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#if defined(MATE_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mate {
namespace {

// ---- instruction sets ---------------------------------------------------------------------------

struct Isa {
  const char* name;
  RunItem run;
  const LayerKernels* layer;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(MATE_HAS_AMX)
// Linux gives a process the tile registers only if it asks, once, and may refuse.
bool may_use_tile_registers() {
  constexpr int kGetPermitted = 0x1022, kRequest = 0x1023, kTileData = 18;  // asm/prctl.h
  uint64_t permitted = 0;
  syscall(SYS_arch_prctl, kRequest, kTileData);
  return syscall(SYS_arch_prctl, kGetPermitted, &permitted) == 0 && (permitted >> kTileData & 1);
}
bool has_amx() {
  constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16) ||
      !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) {
    return false;
  }
  static const bool may = may_use_tile_registers();
  return may;
}
#endif

// The best first.
const Isa kIsas[] = {
#if defined(MATE_HAS_AMX)
    {"amx", amx::run_item, &avx512::layer_kernels, has_amx},
#endif
#if defined(__x86_64__)
    {"avx512", avx512::run_item, &avx512::layer_kernels, has_avx512},
    {"avx2", avx2::run_item, &avx2::layer_kernels, has_avx2},
#endif
    {"portable", portable::run_item, &portable::layer_kernels, [] { return true; }},
};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if ((!name || std::strcmp(name, isa.name) == 0) && isa.runs_here()) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*> chosen_isa{nullptr};

const Isa& current_isa() {
  const Isa* isa = chosen_isa.load();
  if (!isa) chosen_isa.store(isa = find_isa(nullptr));
  return *isa;
}

// ---- threads ------------------------------------------------------------------------------------

std::atomic<mate_parallel_fn> parallel{nullptr};

// Products of strong decays reach denormal numbers, which some processors handle a hundred times
// slower; here they are as good as zero.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

struct Team {
  int threads;
  void (*work)(void* context, int slot);
  void* context;
  std::atomic<int> arrived{0};

  void join() {
    const int slot = arrived.fetch_add(1);
    if (slot >= threads) return;  // more than were asked for
    const FlushDenormals flush;
    work(context, slot);
  }
  static void join(void* team) { static_cast<Team*>(team)->join(); }
};

void run_in_own_threads(Team& team) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < team.threads; ++i) others.emplace_back([&] { team.join(); });
  } catch (const std::exception&) {  // no more threads to be had: these do the work
  }
  team.join();
  for (std::thread& thread : others) thread.join();
}

}  // namespace

const LayerKernels& current_layer_kernels() { return *current_isa().layer; }

void run_team(int threads, void (*work)(void* context, int slot), void* context) {
  Team team{threads, work, context};
  const mate_parallel_fn run = parallel.load();
  if (threads == 1) {
    team.join();
  } else if (run) {
    run(&Team::join, &team, static_cast<unsigned>(threads), 0);
  } else {
    run_in_own_threads(team);
  }
}

namespace {

bool known_codes(const mate_kda_args& args) {
  for (const mate_tensor* x : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.output,
                               &args.initial_state, &args.final_state, &args.token_states}) {
    if (x->dtype < MATE_FLOAT32 || x->dtype > MATE_BFLOAT16) return false;
  }
  const bool gate_complete = args.gate == MATE_GATE_LOG_DECAY || (args.A_log && args.dt_bias);
  return args.gate >= MATE_GATE_LOG_DECAY && args.gate <= MATE_GATE_SOFTPLUS && gate_complete &&
         args.algorithm >= MATE_AUTO && args.algorithm <= MATE_RECURRENT &&
         (!args.token_states.data || args.algorithm == MATE_RECURRENT) && args.heads_qk > 0 &&
         args.heads_v % args.heads_qk == 0;
}

int32_t forward(const mate_kda_args& args) {
  const Plan plan(args);
  if (plan.items() == 0) return MATE_OK;
  const size_t floats = (plan.scratch_floats() * plan.threads() + 15) / 16 * 16;
  const std::unique_ptr<float, decltype(&std::free)> scratch(
      static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), std::free);
  if (!scratch) return MATE_OUT_OF_MEMORY;

  run_items(plan.items(), plan.threads(), [&, run = current_isa().run](int64_t i, int slot) {
    run(args, plan.item(i), scratch.get() + slot * plan.scratch_floats());
  });
  return MATE_OK;
}

}  // namespace
}  // namespace mate

MATE_EXPORT int32_t mate_abi_version(void) { return MATE_ABI_VERSION; }

MATE_EXPORT int32_t mate_kda_forward(const mate_kda_args* args) {
  if (!mate::known_codes(*args)) return MATE_UNSUPPORTED;
  try {
    return mate::forward(*args);
  } catch (const std::exception&) {  // std::bad_alloc, before anything is written
    return MATE_OUT_OF_MEMORY;
  }
}

MATE_EXPORT const char* mate_cpu_isa(void) { return mate::current_isa().name; }

MATE_EXPORT int32_t mate_cpu_use_isa(const char* name) {
  const mate::Isa* isa = mate::find_isa(name);
  if (!isa) return MATE_UNSUPPORTED;
  mate::chosen_isa.store(isa);
  return MATE_OK;
}

MATE_EXPORT void mate_cpu_set_parallel(mate_parallel_fn run) { mate::parallel.store(run); }
