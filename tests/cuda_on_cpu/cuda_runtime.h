// A stand-in for the CUDA runtime: the kernels in csrc/cuda compile against it as C++ and run on a CPU, where
// sanitizers see every access. It has what they use and no more: anything else does not compile.
//
// It runs them in one of two ways, as the program links:
//   in_order.cpp      lanes, warps and blocks one after the other: quick, and with sanitizers of memory
//   interleaved.cpp   in random order with a switch at any access, and with a detector of races (races.cpp)
// Lanes that disagree on whether they reach a collective (__ballot_sync, __reduce_max_sync, __shfl_xor_sync,
// __syncwarp) are an error in both, as on a GPU. A kernel runs when it is launched, or when the graph that captured it
// is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#if defined(GENOPT_INTERLEAVED)
#include "interleaved.h"
#else
#define __shared__ static  // blocks run one at a time
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
  }
};
struct uint1 {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx;
unsigned __ballot_sync(unsigned mask, bool predicate);
unsigned __reduce_max_sync(unsigned mask, unsigned value);
// `value` of the lane whose number differs in the bits of `lanes`.
uint64_t cuda_on_cpu_exchange(unsigned mask, uint64_t value, int lanes);
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return static_cast<T>(cuda_on_cpu_exchange(mask, value, lanes));
}
void __syncwarp();
void __threadfence();
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicMax(unsigned long long* address, unsigned long long value);
inline double __ldcg(const double* address) {
  return *address;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

// Four of the eight bytes of x and y (x has the lower four), by the digits of `selector`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = x | static_cast<uint64_t>(y) << 32;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) picked |= (both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return picked;
}

inline bool __isGlobal(const void*) {
  return true;
}
#define __builtin_assume(condition) static_cast<void>(condition)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}

using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// For tests: so many launches succeed, and the next one fails; below 0: none does.
extern int cuda_on_cpu_launches_left;

// Runs `thread` for every thread of the grid, or captures it.
cudaError_t cuda_on_cpu_launch(const cudaLaunchConfig_t& config, std::function<void()> thread);
// Runs it: in_order.cpp or interleaved.cpp.
void cuda_on_cpu_run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "more arguments than a launch can take");
  // Copied at the launch, as CUDA does.
  const auto copies = std::make_shared<std::tuple<Parameters...>>(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu_launch(*config, [kernel, copies] { std::apply(kernel, *copies); });
}

// For tests. Device memory is heap memory of exactly the size asked for.
enum cudaMemcpyKind { cudaMemcpyDefault };
cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaDeviceSynchronize();

enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraph_st*;
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
