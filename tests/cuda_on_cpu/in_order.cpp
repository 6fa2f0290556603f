// How kernels run, of the stand-in for CUDA: a block's threads are fibers. A warp's 32 lanes run one after the other,
// each until it ends or reaches a collective; when all have, the collective is computed and they go on. Blocks and
// warps run in order. See cuda_runtime.h.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx;

namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;  // the address sanitizer clears its shadow at every switch: keep it small

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: block %u thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// One stack and the point where it stopped, told to the address sanitizer at every switch.
struct Context {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;

  void make(void (*run)()) {
    stack.reset(new char[kStackBytes]);
    bottom = stack.get();
    bytes = kStackBytes;
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, run, 0);
  }
  void switch_to(Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.bytes);
#endif
    swapcontext(&context, &to.context);
    arrive(nullptr);
  }
  // Where a switch to this context arrives; `from`, where given, learns its stack.
  void arrive(Context* from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, from ? &from->bottom : nullptr, from ? &from->bytes : nullptr);
#endif
    (void)from;
  }
};

// The warp that runs now.
struct Warp {
  enum State { kRuns, kWaits, kEnded };
  std::array<Context, kLanes> lanes;
  std::array<State, kLanes> states{};
  std::array<uint64_t, kLanes> values{}, exchanged{};  // what lanes bring to a collective, and what all had brought
  unsigned ballot = 0, largest = 0, lane = 0;
  Context scheduler;
  const std::function<void()>* thread = nullptr;

  Warp() {
    for (Context& each : lanes) each.make(&Warp::run_lane);
  }

  static Warp& instance() {
    static Warp warp;
    return warp;
  }

  // A lane's fiber lives for ever: it runs one thread after the other.
  static void run_lane() {
    Warp& warp = instance();
    Context& own = warp.lanes[warp.lane];
    own.arrive(&warp.scheduler);
    for (;;) {
      (*warp.thread)();
      warp.states[warp.lane] = kEnded;
      own.switch_to(warp.scheduler);
    }
  }

  void run(const std::function<void()>& body, unsigned first_thread) {
    thread = &body;
    states.fill(kRuns);
    for (;;) {
      for (lane = 0; lane < kLanes; ++lane) {
        threadIdx.x = first_thread + lane;
        states[lane] = kRuns;
        scheduler.switch_to(lanes[lane]);
      }
      ballot = largest = 0;
      for (unsigned i = 0; i < kLanes; ++i) {
        if (states[i] != states[0]) fail("some lanes of a warp wait in a collective, and others ended");
        ballot |= static_cast<unsigned>(values[i] != 0) << i;
        largest = std::max(largest, static_cast<unsigned>(values[i]));
      }
      exchanged = values;
      if (states[0] == kEnded) return;
    }
  }

  // A lane waits until all have come.
  void meet(const char* what, unsigned mask, uint64_t value) {
    if (mask != ~0u) fail(what);
    const unsigned own = lane;
    values[own] = value;
    states[own] = kWaits;
    lanes[own].switch_to(scheduler);
  }
};

}  // namespace

void cuda_on_cpu_run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  for (unsigned block = 0; block < config.gridDim.x; ++block) {
    blockIdx.x = block;
    for (unsigned first = 0; first < config.blockDim.x; first += kLanes) Warp::instance().run(thread, first);
  }
}

unsigned __ballot_sync(unsigned mask, bool predicate) {
  Warp::instance().meet("__ballot_sync: only whole warps are supported", mask, predicate);
  return Warp::instance().ballot;
}
unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  Warp::instance().meet("__reduce_max_sync: only whole warps are supported", mask, value);
  return Warp::instance().largest;
}

void __syncwarp() {
  Warp::instance().meet("__syncwarp: only whole warps are supported", ~0u, 0);
}
void __threadfence() {
}
unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = old > value ? old : value;
  return old;
}

uint64_t cuda_on_cpu_exchange(unsigned mask, uint64_t value, int lanes) {
  Warp& warp = Warp::instance();
  const unsigned lane = warp.lane;
  warp.meet("__shfl_xor_sync: only whole warps are supported", mask, value);
  return warp.exchanged[(lane ^ static_cast<unsigned>(lanes)) % kLanes];
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = ::operator new(bytes, std::align_val_t{256});
  std::memset(*address, 0xcd, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  ::operator delete(address, std::align_val_t{256});
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
