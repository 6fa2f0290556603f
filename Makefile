# Three commands for a fresh clone: make demo, make test, make bench. Each sets everything up first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench lint clean

demo: $(STAMP)
	$(BIN)/python examples/train_gpt.py

test: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy
	$(BIN)/stubtest genopt_ext._C --allowlist tests/stubtest_allowlist.txt

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# The tools, torch and the extension; again when a source or a pin changes.
$(STAMP): $(VENV)/bin/pip requirements-dev.txt setup.py pyproject.toml $(shell find csrc genopt_ext -name '*.h' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.txt' -o -name '*.py' | grep -v _build_info)
	$(BIN)/pip install --quiet "$(TORCH)" -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info genopt_ext/*.so genopt_ext/_build_info.py
