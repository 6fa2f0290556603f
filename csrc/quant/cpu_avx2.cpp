// Quantization for x86-64 with AVX2. What needs no AVX2 is included first, and stays free of it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu.h"

#pragma GCC target("avx2")
#define GENOPT_CAPABILITY avx2
#include "cpu_kernels.h"
#endif
