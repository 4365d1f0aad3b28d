# make demo and make test work in a fresh clone on a machine with Python, a C++ compiler and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH  ?= torch==2.13.0

SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find cmake csrc mate -type f -not -name '*.so' -not -name '*.pyc')

CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.mu')

.PHONY: demo test fuzz test-sanitize bench lint format develop clean

demo: $(VENV)/installed
	$(BIN)/python examples/generate.py
	$(BIN)/python examples/finetune.py

test: $(VENV)/installed
	$(BIN)/pytest

# 100,000 drawn cases take about an hour: make fuzz CASES=1000 for a taste.
CASES ?= 100000
fuzz: $(VENV)/installed
	$(BIN)/python tests/fuzz_kda.py --cases $(CASES)

# The kernels' own tests and drawn cases under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED ?= tests/backends/test_native.py tests/backends/test_native_layer.py tests/functional/test_kda_fuzz.py
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
test-sanitize: $(VENV)/installed
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="$(SANITIZE)"
	cmake --build build/sanitize --parallel
	ASAN_OPTIONS=detect_leaks=0 MATE_CPU_LIBRARY=$(CURDIR)/build/sanitize/libmate_cpu.so \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest $(SANITIZED)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/cpu.py

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/tools
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The kernels inside the source tree, for work on mate itself with PYTHONPATH=. set.
develop: $(VENV)/installed
	cmake -S . -B build/develop
	cmake --build build/develop --parallel
	cmake --install build/develop --prefix .

clean:
	rm -rf $(VENV) build mate/lib out

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "installing mate into $(VENV) (compiles the CPU kernels)"
	@$(PIP) '.[test]'
	@touch $@

$(VENV)/tools: $(VENV)/installed
	@$(PIP) '.[dev]'
	@touch $@

# torch first and by its exact version: a looser requirement would fetch gigabytes of CUDA packages.
$(VENV)/torch:
	@echo "making $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@touch $@
