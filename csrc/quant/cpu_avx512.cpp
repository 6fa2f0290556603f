// Quantization for x86-64 with AVX-512. What needs no AVX-512 is included first, and stays free of it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define GENOPT_CAPABILITY avx512
#include "cpu_kernels.h"
#endif
