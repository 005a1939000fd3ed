# `make demo` runs the main job on the photograph that ships with the package, `make test` passes the tests.
# Each makes its own environment in .venv and installs what it needs there; nothing else on the machine changes.
#
# Optional variables, on the command line or in the environment:
#   PYTHON        interpreter the environment is made with (3.10 or newer)                 default: python3
#   VENV          where the environment lies                                               default: .venv
#   TORCH_INDEX   package index PyTorch is looked for in first. Where there is no NVIDIA GPU,
#                 TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                 installs the small CPU build; without it, pip's own index decides (on Linux that is a build
#                 with CUDA: it works as well, but is a download of several gigabytes).
#   PIP_ARGS      further arguments of every `pip install`, such as `--index-url URL` or `--no-index --find-links DIR`
#   TORCH         requirements that install PyTorch, when the choice below is not the right one
#   PYTEST_ARGS   arguments of pytest: `make test PYTEST_ARGS="-x tests/cli"`
#   DEMO_ARGS     arguments of `lowkernels demo`

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses=4
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
OS := $(shell uname -s)

# Without a GPU the versions are pinned, so that the tests mean the same everywhere. With one, the newest build
# that fits comes from the index. timm and torchvision only serve the tests (parity with them); torchvision's
# release must fit torch's, and --no-deps keeps the two from bringing a torch of their own.
ifeq ($(GPU),0)
TORCH ?= torch==2.13.0 $(if $(filter Linux,$(OS)),triton==3.7.1)
PARITY := --no-deps timm==1.0.31 torchvision==0.28.0
else
TORCH ?= torch
PARITY := timm==1.0.31 torchvision
endif

# A step that broke off is done again, not taken for finished.
.DELETE_ON_ERROR:
.PHONY: demo test lint types check aot build clean

demo: $(VENV)/.demo
	$(BIN)/lowkernels demo $(DEMO_ARGS)

# One torch thread a worker: the workers are what fills the cores. No test may reach for the network.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

check: lint types test

# Every Triton kernel for every architecture; writes the table that a test holds against the sources. The oldest Triton that is supported must
# compile them all, without spills, as well.
aot: $(VENV)/.test $(VENV)/triton-3.6.0
	$(BIN)/python -m lowkernels.backends.triton.aot --arch all --write docs/perf/triton_resources.md
	PYTHONPATH=$(VENV)/triton-3.6.0 $(BIN)/python -m lowkernels.backends.triton.aot --arch all

$(VENV)/triton-3.6.0: | $(VENV)/bin/python
	$(PIP) --no-deps --target $@ triton==3.6.0

# setuptools would put files of an earlier build into the wheel.
build: $(VENV)/.torch
	rm -rf build
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lowkernels needs Python 3.10 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# Each stamp is the time of the last complete installation; an edit of the requirements makes it out of date.
$(VENV)/.torch: Makefile pyproject.toml | $(VENV)/bin/python
	$(PIP) 'setuptools>=77' wheel 'numpy>=1.26'
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) --no-build-isolation --editable '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PARITY)
	$(PIP) pyyaml
	touch $@

clean:
	rm -rf $(VENV) build dist bench-out *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
