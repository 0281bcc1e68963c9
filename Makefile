# make demo   build the demo bundle and let it answer questions about pictures
# make test   run all tests
# make bench  time kernels, graphs and whole requests, each checked first; ARGS= for pytest, e.g. ARGS=--benchmark-compare
# make lint   check format, style and types
# make sanitize       run the kernels' tests on kernels compiled with AddressSanitizer and UBSan (Linux, gcc; minutes)
# make check-tensorrt check the calls of TensorRT against NVIDIA's bindings (g++; no GPU; a minute)
# make check-aarch64  run the kernels of aarch64 under emulation (g++-aarch64-linux-gnu, qemu-user-static; a minute)
# make check-avx512   run the kernels' tests with AVX-512 and AMX as functions, on any x86 (SIMDe is fetched; 8 minutes)
# make check-x86      run the kernels under emulation of processors without AVX-512, and without AVX (qemu-user-static; minutes)
# make clean  remove what was built, the virtual environment included
#
# Everything is installed into .venv, in the versions of constraints.txt. torch comes first and from TORCH_INDEX too, so
# that Linux gets the CPU build (200 MB) and not the CUDA one (3 GB); where that index cannot be reached, only what pip
# is configured for is asked. pip's environment variables and pip.conf are honoured.

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TARGET ?= onnxruntime:cpu

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := build/installed
BUNDLE := build/demo-bundle
BENCH_BUNDLE := build/bench-bundle
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.h')
SOURCES := $(shell find backends export runtime lensc profiles kernels -name '*.py' -o -name '*.safetensors' -o -name '*.toml')

# The root folders must not be importable by their bare names (`kernels` is somebody else's package).
export PYTHONSAFEPATH := 1

SIMDE ?= build/simde
SIMDE_COMMIT := c285589af53dac2ef79a18e9cf9910b388863f60

.PHONY: demo test bench lint sanitize check-tensorrt check-aarch64 check-avx512 check-x86 clean
# A bundle is swapped in whole, so an interrupted build leaves the former one: make must not delete it.
.PRECIOUS: $(BUNDLE)/manifest.json $(BENCH_BUNDLE)/manifest.json

demo: $(BUNDLE)/manifest.json
	@$(BIN)/python -m lensc.bench.demo $(BUNDLE)

# Two processes, each with whole files, whose fixtures it makes once; in the order of the folders, the long ones first.
test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: $(BENCH_BUNDLE)/manifest.json
	@$(BIN)/python -c 'import pytest_benchmark' 2>/dev/null || $(PIP) install -qq -c constraints.txt pytest-benchmark
	@$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

lint: $(INSTALLED)
	@failed=0; \
	$(BIN)/ruff format --check --quiet . || failed=1; \
	$(BIN)/ruff check --quiet . || failed=1; \
	$(BIN)/mypy || failed=1; \
	exit $$failed

# nanobind is not in the environment: pip has removed what it needed to build lensc.
# Python itself is not instrumented, so the sanitizer's library comes first; what Python leaks at its end is not ours.
sanitize: $(INSTALLED)
	@$(PIP) install -qq -c constraints.txt nanobind
	cmake -S kernels -B build/sanitize -DLENSC_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 \
	$(BIN)/python tests/kernels/with_module.py build/sanitize/_cpu.*.so -q -p no:cacheprovider tests/kernels --ignore tests/kernels/gpu

# NVIDIA's bindings go into an environment of their own: their licence lets nobody pass on what is made of them.
check-tensorrt: $(INSTALLED)
	@$(BIN)/python tests/backends/check_tensorrt.py

check-aarch64:
	cmake -S kernels -B build/check-aarch64 -DLENSC_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/check-aarch64 --parallel
	qemu-aarch64-static build/check-aarch64/lensc_check neon generic

check-avx512: $(INSTALLED) $(SIMDE)/simde
	@$(PIP) install -qq -c constraints.txt nanobind
	cmake -S kernels -B build/check-avx512 -DLENSC_EMULATE=$(abspath $(SIMDE)) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/check-avx512 --parallel
	$(BIN)/python tests/kernels/with_module.py build/check-avx512/_cpu.*.so -q -p no:cacheprovider tests/kernels

$(SIMDE)/simde:
	git init -q $(SIMDE)
	git -C $(SIMDE) fetch -q --depth 1 https://github.com/simd-everywhere/simde $(SIMDE_COMMIT)
	git -C $(SIMDE) checkout -q FETCH_HEAD

check-x86:
	cmake -S kernels -B build/check-x86 -DLENSC_CHECK=ON
	cmake --build build/check-x86 --parallel
	build/check-x86/lensc_check
	qemu-x86_64-static -cpu Nehalem build/check-x86/lensc_check generic
	qemu-x86_64-static -cpu Haswell build/check-x86/lensc_check avx2 generic

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BUNDLE)/manifest.json: $(INSTALLED) $(SOURCES)
	@$(BIN)/python -m lensc build demo --target $(TARGET) -o $(BUNDLE)
	@touch $@

$(BENCH_BUNDLE)/manifest.json: $(INSTALLED) $(SOURCES)
	@$(BIN)/python -m lensc build demo --target onnxruntime:cpu --target openvino:cpu --target native:cpu -o $(BENCH_BUNDLE)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lensc needs Python 3.11 or newer, $(PYTHON) is not; name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The editable install imports through links in build/ (kernels/CMakeLists.txt), hence the stamp there. A file added to
# lensc/ needs a link, hence the folder; importing it first keeps the bytecode folder from looking like a new file.
$(INSTALLED): pyproject.toml constraints.txt kernels/CMakeLists.txt $(KERNELS) lensc $(BIN)/python
	@if $(BIN)/python -c 'from urllib.request import urlopen; urlopen("$(TORCH_INDEX)/torch/", timeout=20)' 2>/dev/null; \
	then echo "installing torch from $(TORCH_INDEX)"; index="--extra-index-url $(TORCH_INDEX)"; \
	else echo "installing torch; $(TORCH_INDEX) cannot be reached, so pip's configuration chooses the build"; index=; fi; \
	$(PIP) install -qq -c constraints.txt $$index torch
	@echo "installing lensc and the other packages of constraints.txt"
	@PIP_CONSTRAINT=constraints.txt $(PIP) install -qq -e '.[dev]'
	@$(BIN)/python -c 'import lensc.cli'
	@touch $@
