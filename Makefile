# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The short verbs. Each makes what it needs: the first `make serve` or `make test` builds everything.

PYTHON  ?= python3
VENV    ?= .venv
HOST    ?= 127.0.0.1
PORT    ?= 8000
MODEL   ?=
PREFILL ?= 1
DECODE  ?= 1
SERVE_ARGS ?=
TEST_ARGS  ?=
BIN     := $(VENV)/bin
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)

NATIVE  := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CPP     := $(shell find csrc tests/cpp tests/fake_verbs tests/fake_cuda tests/fuzz tests/rdma_vm -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
PY_DIRS := python tests bench tools examples

.DEFAULT_GOAL := help
.PHONY: help build serve test test-all test-vm test-vm-core test-cpp sanitize models fuzz lint format typecheck bench gpu-check doctor clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

serve: $(VENV)/.built  ## Router + prefill + decode with the bundled model. PORT= MODEL= PREFILL= DECODE= change it
	@$(BIN)/kvxfer serve $(if $(MODEL),"$(MODEL)") --host $(HOST) --port $(PORT) --prefill $(PREFILL) --decode $(DECODE) $(SERVE_ARGS)

test: $(VENV)/.tested-deps  ## The ordinary test suite, on any machine
	$(BIN)/python -m pytest -m "not slow and not vm" $(TEST_ARGS)

test-all: $(VENV)/.tested-deps  ## The long runs too
	$(BIN)/python -m pytest $(TEST_ARGS)

VM_BUDGET_S ?= 570
VM_TESTS ?= tests/rdma_vm
test-vm: $(VENV)/.tested-deps  ## Verbs on Soft-RoCE in a virtual machine (fetches 90 MB of Debian packages once), 10 minutes at most
	@timeout 300 tests/rdma_vm/run --prepare || case $$? in 77) ;; 124) echo "rdma-vm: no packages within 300 s: skipped" ;; *) exit 1 ;; esac
	KVXFER_VM_BUDGET_S=$(VM_BUDGET_S) $(BIN)/python -m pytest -m "vm and not slow" $(VM_TESTS) --durations=10 $(TEST_ARGS)

test-vm-core:  ## The engine's part of test-vm in one boot: conformance, a death, two rails, a cable that loses packets
	@$(MAKE) test-vm VM_TESTS=tests/rdma_vm/test_engine_over_verbs.py::test_the_core_of_all_in_one_boot

test-cpp: | $(VENV)/.venv  ## The C++ tests (needs doctest: apt-get install doctest-dev)
	@tools/cpp_tests.sh plain

sanitize: | $(VENV)/.venv  ## The C++ tests under ASan+UBSan and under TSan
	@tools/cpp_tests.sh asan tsan

models:  ## The models in formal/, checked exhaustively (needs spin)
	@formal/check.sh

FUZZ ?= all
FUZZ_FOR ?= 60s
fuzz: | $(VENV)/.venv  ## Fuzzes what reads bytes of strangers (needs clang). FUZZ=wire FUZZ_FOR=600s change it
	@tools/fuzz.sh $(FUZZ) $(FUZZ_FOR)

lint: $(VENV)/.linted-deps  ## ruff and clang-format, as CI runs them
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(VENV)/.linted-deps  ## Rewrites the sources in house style
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

typecheck: $(VENV)/.linted-deps $(VENV)/.built  ## mypy --strict on the package
	$(BIN)/mypy

bench: $(VENV)/.built  ## Benchmarks, each with its bound or baseline from the same run
	$(BIN)/python bench/bench_transfer.py
	$(BIN)/python bench/bench_kernels.py
	$(BIN)/python bench/bench_serving.py

gpu-check:  ## On a machine with an NVIDIA GPU: builds, checks and measures the GPU kernels, offline, in minutes
	@PYTHON="$(PYTHON)" tools/gpu_check.sh

doctor: $(VENV)/.built  ## What works on this machine, what does not, and why
	@$(BIN)/kvxfer doctor

build: $(VENV)/.built  ## The virtual environment and the extension modules

clean:  ## Removes the virtual environment and every build folder
	rm -rf $(VENV) build build*.log .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.venv:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/make_venv.sh
	@touch $@

$(VENV)/.deps: pyproject.toml constraints.txt | $(VENV)/.venv
	@echo "==> 2/3 Installing what the server needs (torch is the large one)"
	$(BIN)/python -m pip install -c constraints.txt --group build --group server
	@touch $@

$(VENV)/.built: $(NATIVE) $(VENV)/.deps
	@echo "==> 3/3 Building the C++ extensions (a minute or two)"
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m pip install -v --no-build-isolation --no-deps -e . > build.log 2>&1 & pid=$$!; \
	  while kill -0 $$pid 2>/dev/null; do printf '\r    %s' "$$(grep -o '^ *\[[0-9]*/[0-9]*\]' build.log 2>/dev/null | tail -1)"; sleep 1; done; \
	  wait $$pid && printf '\r    done      \n' || { tail -40 build.log; echo "The build failed; the whole log is in build.log"; exit 1; }
	@touch $@

$(VENV)/.tested-deps: $(VENV)/.built
	@echo "==> Installing what the tests need"
	$(BIN)/python -m pip install -c constraints.txt --group test
	@touch $@

$(VENV)/.linted-deps: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -c constraints.txt --group lint
	@touch $@
