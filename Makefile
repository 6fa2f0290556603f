# Three commands for a fresh clone: make demo, make test, make bench. Each sets everything up first.
# make cuda-on-cpu runs the CUDA kernels without a GPU, under sanitizers and a detector of races; make gpu-check is for
# a machine with one.
# make instructions counts what CPU cases take, under valgrind; make sass what compiled CUDA kernels do, by emulation.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
STAMP := $(VENV)/.installed
SHELL := /bin/bash -o pipefail

.PHONY: demo test bench bench-peers lint cuda-on-cpu instructions sass clean
.PHONY: gpu-check gpu-times gpu-checks gpu-wheels

demo: $(STAMP)
	$(BIN)/python examples/train_gpt.py

test: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m bench run

# Others' optimizers, for make bench to compare with.
bench-peers: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation -r requirements-peers.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/stubtest genopt_ext._C --allowlist tests/stubtest_allowlist.txt

# The C++ tests and Python's of kernels, with the .cu sources compiled as C++: see tests/cuda_on_cpu.
cuda-on-cpu: $(STAMP)
	cmake -S . -B build/sanitize -G Ninja -DGENOPT_SANITIZE=ON -DGENOPT_WERROR=ON -DGENOPT_PYTHON=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_PREFIX_PATH=$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)') >/dev/null
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure -j 2
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 GENOPT_TEST_CUDA_ON_CPU=build/sanitize/_C.so \
	  $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_bits.py tests/test_state.py tests/test_cuda.py \
	    tests/test_clip.py tests/test_gradient_path.py tests/test_amp.py tests/test_ema.py tests/test_int8_format.py tests/test_quant.py \
	    tests/test_sharding.py --deselect tests/test_bits.py::test_no_less_accurate_than_torch # as the bits are those of the CPU

instructions: $(STAMP)
	$(BIN)/python -m bench.instructions --check

# Where there is nvcc but no nvdisasm, triton brings one; it is not installed, as a torch with CUDA has its own.
NVDISASM := $(if $(shell command -v nvcc),$(if $(shell command -v nvdisasm),,build/sass/triton))

sass: $(STAMP) $(NVDISASM)
	$(BIN)/python -m bench.sass --check

build/sass/triton: | $(STAMP)
	$(BIN)/pip install --quiet --no-deps --target $@ triton==3.9.0

# These take $(PYTHON) as it is: with a torch that has CUDA, and the packages of requirements-dev.txt. Each is at most
# nine minutes; $OUT, where it is set, or build/gpu-check has folders of what they say. Both run, whatever fails.
gpu-check:
	$(PYTHON) bench/gpu_check.py times; times=$$?; $(PYTHON) bench/gpu_check.py checks && exit $$times

gpu-times:
	$(PYTHON) bench/gpu_check.py times

gpu-checks:
	$(PYTHON) bench/gpu_check.py checks

# What a machine without network may lack, for its Python; pip takes each name of a platform as it is.
GPU_PYTHON := 3.12
GPU_PLATFORMS := $(addsuffix _x86_64,manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014)

gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  $(addprefix --platform ,$(GPU_PLATFORMS)) --dest build/gpu-wheels -r requirements-gpu-check.txt

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch and the tools; again when a pin changes.
$(TOOLS): requirements-dev.txt | $(VENV)/bin/pip
	$(BIN)/pip install "$(TORCH)" -r requirements-dev.txt
	touch $@

# The extension; again when a source changes. A first build takes minutes: each file is told when it is compiled.
$(STAMP): $(TOOLS) setup.py pyproject.toml $(shell find csrc genopt_ext -name '*.h' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.py' | grep -v _build_info)
	@mkdir -p build
	@echo "compiling genopt_ext; all of its output goes to build/install.log"
	@$(BIN)/pip install -v --no-build-isolation --no-deps --editable . 2>&1 | tee build/install.log \
	  | sed -nuE 's/.*(\[[0-9]+\/[0-9]+\]).* -c [^ ]*\/(csrc\/[^ ]+).*/\1 \2/p' \
	  || { tail -n 100 build/install.log; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info genopt_ext/*.so genopt_ext/_build_info.py
