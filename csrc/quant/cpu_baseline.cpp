// Quantization for whatever the compiler targets by default: on x86-64, SSE2.
#define GENOPT_CAPABILITY baseline
#include "cpu_kernels.h"
