# Runs everything in an environment of its own, $(VENV). Stamps in there remember what is installed, so that a second
# run of a target is quick, and rebuilds only if the compiled code or the packaging changed.

# The Python (3.10 or later) to begin with, and the PyTorch this repository is developed with.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Further arguments of pytest and of the quickstart: make test ARGS="-k noise"
ARGS ?=

BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc tests/cpp tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f)

# Some machines set this. Python then keeps nothing of what it compiles, and each of a hundred processes compiles PyTorch's
# files again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installations into one environment at once would break it.
.NOTPARALLEL:
.PHONY: help quickstart test test-slow bench bench-guard performance dispatch gpu-check gpu-artifacts lint typecheck wheel wheels clean

help:  ## say what there is (the default)
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="..."], where TARGET is one of'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

quickstart: $(VENV)/.train  ## install, train a VAE, a GAN and a DDPM on real digits, draw pictures, time the kernels
	$(BIN)/gencore quickstart $(ARGS)

# In some processes at once, each on one thread: two that share their threads would wait for each other. By file, as some
# build for minutes what all their tests need; in the order of tests/conftest.py.
test: $(VENV)/.dev  ## install, run every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev  ## run the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(VENV)/.dev  ## time every op against its peers and its floor (ARGS: those of gencore bench)
	$(BIN)/gencore bench $(ARGS)

bench-guard: $(VENV)/.dev  ## has an op become slower than in the committed results of such a machine?
	$(BIN)/python benchmarks/guard.py $(ARGS)

performance: $(VENV)/.dev  ## write docs/performance.md and README's figures from the committed results
	$(BIN)/python benchmarks/document.py

dispatch: $(VENV)/.dev  ## write the tables of who runs an op on a GPU from the committed results (ARGS: other files)
	$(BIN)/python benchmarks/dispatch.py $(ARGS)

# On a machine with a GPU nothing is installed: PYTHON has what is needed.
STEPS ?=
CAP ?=
gpu-check: $(if $(DRY),$(VENV)/.dev)  ## on a GPU: test, sanitize, time the kernels (STEPS="smoke cuda", CAP=240, DRY=1)
	$(if $(DRY),$(BIN)/python,$(PYTHON)) .ci/gpu_check $(if $(CAP),--cap $(CAP)) $(if $(DRY),--dry) $(STEPS)

gpu-artifacts:  ## build the modules that gpu-check takes to a machine with Python 3.12 and an H100 or H200
	$(PYTHON) .ci/gpu_check/modules.py

# Code in Markdown is laid out for reading.
lint: $(VENV)/.dev  ## check the style of Python and C++, and that CMake configures without a complaint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude '*.md' .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/cmake -S . -B build/lint -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja --fresh --log-level=WARNING \
	  -DGENCORE_PYTHON=OFF -DGENCORE_WERROR=ON -Werror=dev

typecheck: $(VENV)/.dev  ## check the types
	$(BIN)/mypy

wheel: $(VENV)/.dev  ## build the source distribution, and from it the wheel, into dist/
	$(BIN)/python -m build

# Both from one copy of the source distribution, so that the second finds the CPU kernels compiled. The build tag tells
# the two apart in one folder, where pip takes the higher. libgomp keeps its name and stays outside, so
# that the kernels use the threads that torch uses; the CUDA driver is the machine's.
WHEELHOUSE ?= wheelhouse
# Empty: no wheel with CUDA.
CUDA_WHEEL ?= $(or $(CUDACXX),$(shell command -v nvcc 2>/dev/null))
BUILD_WHEEL = $(BIN)/python -m build --wheel --outdir build/wheels build/sdist -C--build-option=--build-number
wheels: $(VENV)/.dev  ## build wheels for other machines, without and (given nvcc) with CUDA, into wheelhouse/
	rm -rf build/wheels build/sdist
	$(BIN)/python -m build --sdist --outdir build/wheels
	mkdir build/sdist
	tar -xzf build/wheels/*.tar.gz -C build/sdist --strip-components=1
	GENCORE_CUDA=off $(BUILD_WHEEL)=0cpu
	$(if $(CUDA_WHEEL),GENCORE_CUDA=on $(BUILD_WHEEL)=1cuda)
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 --exclude libcuda.so.1 \
	  --wheel-dir '$(WHEELHOUSE)' build/wheels/*.whl

clean:  ## remove what was built; the environment and runs/ stay
	rm -rf build dist wheelhouse *.egg-info gencore/_c*.so $(VENV)/.train $(VENV)/.dev
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find gencore tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# What pip would bring for the time of the build.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
# Files are compiled when they are first imported, which most of them never are.
PIP := $(BIN)/python -m pip install --no-compile

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gencore needs Python 3.10 or later, this is " \
	  + sys.version.split()[0] + "; make PYTHON=python3.12 names another")'
	@echo 'Making the environment $(VENV) with $(TORCH): half a minute, and the time of the download.'
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

# PyTorch is there before, so it is not resolved anew. pip shows nothing of a build: it is done before, by the same tools,
# and pip finds all of it up to date.
$(VENV)/.train $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch $(BUILT_FROM)
	@echo 'Building gencore: a minute and a half on two cores; what has not changed since the last time is not built again.'
	$(PIP) --quiet $(BUILD_TOOLS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@echo 'Installing gencore with what its extra "$*" needs: half a minute, and the time of the download.'
	$(PIP) --quiet --no-build-isolation --editable '.[$*]'
	@touch $@
