// The CPU walk for x86-64 with AVX-512. What needs no AVX-512 is included first, and stays free of it; rules and
// codecs, which are inlined always, are not.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "../codecs/int8_block.h"
#include "../plan/binned.h"
#include "../plan/norm.h"
#include "../rules/all.h"
#pragma GCC pop_options
#include "kernels.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define GENOPT_CAPABILITY avx512
#define GENOPT_VECTOR_BYTES 64
#include "walk.h"
#endif
