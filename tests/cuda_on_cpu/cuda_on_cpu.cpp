// Launches, streams and graphs of the stand-in for CUDA: see cuda_runtime.h. A stream is only a name.
#include <cuda_runtime.h>

#include <mutex>
#include <utility>
#include <vector>

struct CUstream_st {};
struct CUgraph_st {
  std::vector<std::function<void()>> launches;
};

namespace {

constexpr unsigned kLanes = 32;
std::mutex mutex;
CUgraph_st* capture = nullptr;
cudaStream_t captured_stream = nullptr;

}  // namespace

int cuda_on_cpu_launches_left = -1;

cudaError_t cuda_on_cpu_launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool valid = config.gridDim.x > 0 && config.gridDim.y == 1 && config.gridDim.z == 1 && config.blockDim.y == 1 &&
                     config.blockDim.z == 1 && config.blockDim.x > 0 && config.blockDim.x <= 1024 &&
                     config.blockDim.x % kLanes == 0 && config.gridDim.x <= 0x7fffffff && config.dynamicSmemBytes == 0;
  if (!valid || cuda_on_cpu_launches_left-- == 0) return cudaErrorInvalidValue;
  if (capture && config.stream == captured_stream) {
    capture->launches.push_back([config, thread = std::move(thread)] { cuda_on_cpu_run(config, thread); });
  } else {
    cuda_on_cpu_run(config, thread);
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
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
