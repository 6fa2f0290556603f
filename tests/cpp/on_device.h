// Tensors of tests (step_cases.h) in device memory: on a GPU, or on the CPU stand-in for one.
#pragma once

#include "cuda/device_plan.h"
#include "step_cases.h"

inline void check(cudaError_t error) {
  CHECK(error == cudaSuccess, std::string(cudaGetErrorString(error)));
}

// Device memory of exactly this size, so that a checker sees every access beside it.
inline std::shared_ptr<void> allocate(size_t bytes) {
  void* address = nullptr;
  if (bytes) check(cudaMalloc(&address, bytes));
  return {address, [](void* each) { check(cudaFree(each)); }};
}

inline void copy(void* to, const void* from, size_t bytes) {
  if (bytes) check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

// A tensor's operands, step counter and running numbers on the device.
struct OnDevice {
  std::array<std::shared_ptr<void>, kOperands> memory;
  std::shared_ptr<void> step = allocate(sizeof(double)), running = allocate(sizeof Tensor::running);

  explicit OnDevice(const Tensor& t) {
    for (int k = 0; k < kOperands; ++k) send(t, k);
    t.double_step ? copy(step.get(), &t.step64, sizeof t.step64) : copy(step.get(), &t.step, sizeof t.step);
    copy(running.get(), t.running.data(), sizeof t.running);
  }
  void send(const Tensor& t, int k) {
    memory[k] = allocate(t.operands[k].bytes.size());
    copy(memory[k].get(), t.operands[k].bytes.data(), t.operands[k].bytes.size());
  }
  void fetch(Tensor& t) const {
    for (int k = 0; k < kOperands; ++k) copy(t.operands[k].bytes.data(), memory[k].get(), t.operands[k].bytes.size());
    t.double_step ? copy(&t.step64, step.get(), sizeof t.step64) : copy(&t.step, step.get(), sizeof t.step);
    copy(t.running.data(), running.get(), sizeof t.running);
  }
  Row row(Tensor& t, int group) const {
    Row row = t.row(group);
    for (int k = 0; k < kOperands; ++k)
      row.data[k] = memory[k] ? static_cast<char*>(memory[k].get()) + t.operands[k].shift : nullptr;
    row.step = step.get();
    for (int i = 0; i < t.runs; ++i) row.running[i] = static_cast<float*>(running.get()) + i;
    return row;
  }
};

inline Options options_of(const RuleInfo& info, double lr) {
  Options options = kNoOptions;
  for (size_t i = 0; i < info.options.size(); ++i) {
    const std::string key = info.options[i].key;
    options[i] = key == "lr" ? lr : key == "beta2_decay" ? -0.5 : key == "eps" ? 1e-8 : key == "maximize" ? 0.0 : 0.5;
  }
  return options;
}
