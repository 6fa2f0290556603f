#!/usr/bin/env bash
# Builds tests/cpp/test_cuda.cpp for a GPU, without torch: build_cuda.sh <program> <architecture, such as 90>
set -euo pipefail
cd "$(dirname "$0")/../.."
host=-fopenmp,-ffp-contract=off,-fno-math-errno,-fno-trapping-math,-Wno-unknown-pragmas,-Wno-nonnull
sources=$(find csrc -name '*.cpp' -o -name '*.cu' | grep -v bindings | sort)
# shellcheck disable=SC2086
nvcc -std=c++20 -O2 -fmad=false --expt-relaxed-constexpr -Xcompiler "$host" -gencode "arch=compute_$2,code=sm_$2" \
  -lineinfo -t 0 -Icsrc -o "$1" tests/cpp/test_cuda.cpp $sources
