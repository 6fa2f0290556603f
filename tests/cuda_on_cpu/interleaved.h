// The interleaved stand-in (interleaved.cpp), as kernels and tests see it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

// The block's own instance of a variable that is declared here.
void* cuda_on_cpu_shared(size_t bytes, const std::source_location& declared);
// What CMake makes of a declaration with __shared__, which C++ can not give an instance a block.
template <class T>
T& cuda_on_cpu_shared(const std::source_location& declared = std::source_location::current()) {
  return *static_cast<T*>(cuda_on_cpu_shared(sizeof(T), declared));
}

// Of all launches from now on. 0: in order, without a switch.
void cuda_on_cpu_seed(uint64_t seed);
