// The CPU walk for whatever the compiler targets by default: on x86-64, SSE2.
#define GENOPT_CAPABILITY baseline
#define GENOPT_VECTOR_BYTES 16
#include "walk.h"
