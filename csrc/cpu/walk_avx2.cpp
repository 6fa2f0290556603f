// The CPU walk for x86-64 with AVX2. What needs no AVX2 is included first, and stays free of it; rules and codecs,
// which are inlined always, are not.
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
#pragma GCC target("avx2,fma")
#include "../codecs/int8_block.h"
#include "../plan/binned.h"
#include "../plan/norm.h"
#include "../rules/all.h"
#pragma GCC pop_options
#include "kernels.h"
#pragma GCC target("avx2,fma")
#define GENOPT_CAPABILITY avx2
#define GENOPT_VECTOR_BYTES 32
#include "walk.h"
#endif
