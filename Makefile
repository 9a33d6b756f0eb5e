# Works with GNU Make 3.81 and bash 3.2 (macOS). `make train` and `make test` need nothing before them but Python >= 3.11.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BACKEND ?= auto
ARGS ?=
VENV := .venv
comma := ,
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
# MLX's Linux wheel carries a slow reference BLAS; Debian's OpenBLAS takes its place where it is installed. A Mac needs none of it.
# One thread, since more only spin on small matrices; and never for torch alone, whose own BLAS is faster.
FAST := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) OPENBLAS_NUM_THREADS=1,)
EXTRAS := $(if $(filter Darwin,$(shell uname -s)),$(if $(filter arm64,$(shell uname -m)),mlx$(comma)cuda$(comma)data$(comma)dev,cuda$(comma)data$(comma)dev),mlx$(comma)cuda$(comma)data$(comma)dev)

.PHONY: help install train test quick check format wheel clean

help:
	@echo "make train    everything from a fresh machine to the before / after table (BACKEND=mlx|cuda|cpu, ARGS='--steps 50')"
	@echo "make test     the whole test suite    make quick  the suite without slow tests"
	@echo "make check    ruff, mypy, and the import boundaries"
	@echo "make install  the virtual environment .venv with what this machine can use"
	@echo "make format   ruff format    make wheel  builds the distribution    make clean  removes .venv and builds"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "opd needs Python 3.11 or later"; exit 2; }
	@echo "installing into $(VENV) with $(PYTHON); this takes a minute or more"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

train: install
	$(if $(filter mlx,$(BACKEND)),$(FAST),) $(VENV)/bin/opd train --backend $(BACKEND) $(ARGS)

# Processes side by side, of one thread each: a few at most, since each loads both frameworks.
# The ten slowest tests are printed.
test: install
	$(FAST) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q --durations=10 --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

quick:
	$(MAKE) test ARGS="-m 'not slow' $(ARGS)"

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_boundaries.py

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: install
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build
