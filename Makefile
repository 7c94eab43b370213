# Everything runs in .venv, which the first target that needs it makes. Needs: make, Python 3.11 or later with venv, a package index for pip.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUNDLED := $(filter-out %/bundle.js,$(wildcard tether/swarm/js/*.js tether/swarm/js/*.json))
# The first of these that runs, is 3.11 or later and can make a venv. A name may exist and not run (pyenv's shims), so each is tried.
PYTHONS ?= python3 python3.13 python3.12 python3.11 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

ROW ?=
SEED ?=
SCALE ?= 1

.PHONY: help install demo test check lab bench chaos clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## the virtual environment in .venv, and nothing else

demo: $(READY)  ## real models on a lab of this machine, called in three ways, a worker killed, each answer checked
	$(BIN)/python benchmarks/demo.py

test: $(READY)  ## every test, the notebooks with them
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)  ## format, lint, types, layers, spelling, environment.yml: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/repository/test_environment.py

lab: $(READY)  ## a lab in the foreground, until Ctrl-C
	$(BIN)/tether up

bench: $(READY)  ## requests a second beside the floor of this machine; the store beside the plain file; the swarm, in short
	$(BIN)/python benchmarks/online
	$(BIN)/python benchmarks/store
	$(BIN)/python benchmarks/swarm/udx.py --rounds 1 --seconds 2
	$(BIN)/python benchmarks/swarm/found.py --rounds 5
	$(BIN)/python benchmarks/swarm/calls.py --calls 50000 --seconds 5
	$(BIN)/python benchmarks/swarm/replicating.py --mib 256 --rounds 1
	$(BIN)/python benchmarks/swarm/eight.py

chaos: $(READY)  ## the tests that kill processes, at full scale: make chaos [ROW=13] [SEED=7] [SCALE=1]
	TETHER_CHAOS_SEED='$(SEED)' TETHER_CHAOS_SCALE='$(SCALE)' $(BIN)/python -m pytest -m chaos $(if $(ROW),-k 'row_$(ROW)')

clean:  ## remove the venv and what the tools and scripts generate
	rm -rf $(VENV) datasets/digits.zarr datasets/models .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Made again when a dependency, a pin or the swarm's JavaScript changes. pip comes first: groups of pyproject.toml need 25.1, Python 3.11 brings an older one.
$(READY): pyproject.toml constraints.txt hatch_build.py $(BUNDLED)
	@found=; for python in $(PYTHONS); do if "$$python" -c '$(USABLE)' 2>/dev/null; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "Tether needs Python 3.11 or later with venv; none of '$(PYTHONS)' is that." >&2; \
	  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13), or name it: make $(MAKECMDGOALS) PYTHONS=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] && $(BIN)/python -c '$(USABLE)' 2>/dev/null || { echo "making $(VENV) with $$("$$found" --version)"; "$$found" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[all]' --group dev
	@touch $@
