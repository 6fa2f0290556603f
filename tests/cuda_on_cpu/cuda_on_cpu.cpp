// See cuda_runtime.h.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx;

struct CUstream_st {};
struct CUgraph_st {
  std::vector<std::function<void()>> launches;
};

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

std::mutex mutex;
CUgraph_st* capture = nullptr;
cudaStream_t captured_stream = nullptr;

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  for (unsigned block = 0; block < config.gridDim.x; ++block) {
    blockIdx.x = block;
    for (unsigned first = 0; first < config.blockDim.x; first += kLanes) Warp::instance().run(thread, first);
  }
}

}  // namespace

unsigned __ballot_sync(unsigned mask, bool predicate) {
  Warp::instance().meet("__ballot_sync: only whole warps are supported", mask, predicate);
  return Warp::instance().ballot;
}
unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  Warp::instance().meet("__reduce_max_sync: only whole warps are supported", mask, value);
  return Warp::instance().largest;
}

uint64_t cuda_on_cpu_exchange(unsigned mask, uint64_t value, int lanes) {
  Warp& warp = Warp::instance();
  const unsigned lane = warp.lane;
  warp.meet("__shfl_xor_sync: only whole warps are supported", mask, value);
  return warp.exchanged[(lane ^ static_cast<unsigned>(lanes)) % kLanes];
}

cudaError_t cuda_on_cpu_launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool valid = config.gridDim.x > 0 && config.gridDim.y == 1 && config.gridDim.z == 1 && config.blockDim.y == 1 &&
                     config.blockDim.z == 1 && config.blockDim.x > 0 && config.blockDim.x <= 1024 &&
                     config.blockDim.x % kLanes == 0 && config.gridDim.x <= 0x7fffffff && config.dynamicSmemBytes == 0;
  if (!valid) return cudaErrorInvalidValue;
  if (capture && config.stream == captured_stream) {
    capture->launches.push_back([config, thread = std::move(thread)] { run(config, thread); });
  } else {
    run(config, thread);
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
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
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

// Streams and graphs live until the process ends: tests make few.
template <class T>
static T* make() {
  static std::vector<std::unique_ptr<T>> all;
  return all.emplace_back(std::make_unique<T>()).get();
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = make<CUstream_st>();
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  capture = make<CUgraph_st>();
  captured_stream = stream;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream != captured_stream) return cudaErrorInvalidValue;
  *graph = std::exchange(capture, nullptr);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& launch : executable->launches) launch();
  return cudaSuccess;
}
