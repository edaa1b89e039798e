PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(wildcard $(foreach dir,csrc csrc/*,$(addprefix $(dir)/*.,h cpp cu cuh)))

# As many processes as cores: a single one keeps hardly more than one core busy.
PARALLEL := -n auto --maxprocesses=4 --dist=worksteal

.PHONY: help demo test test-all bench docs lint clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Options go through ARGS: make test ARGS="-n 0 -k retiming". Another Python: make demo PYTHON=python3.12'

demo: $(VENV)/.package ## train a small network as a pipeline
	$(BIN)/layerpipe train $(ARGS)

test: $(VENV)/.package ## run the tests but for those marked slow: minutes
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL) $(ARGS)

test-all: $(VENV)/.package ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

bench: $(VENV)/.package ## measure the pipeline on this machine
	$(BIN)/python -m bench.pipeline $(ARGS)

docs: $(VENV)/.package ## write the API reference, made of the docstrings, to build/docs
	$(BIN)/pdoc -d google -o build/docs layerpipe layerpipe_kernels

lint: $(VENV)/.package ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

clean: ## remove what builds and tools left, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f layerpipe_kernels/_C.*.so $(VENV)/.package
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)

# The build's own requirements live in .venv, so a change in csrc compiles only what changed.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'layerpipe needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo 'layerpipe needs venv to make $(VENV): install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12'
	@touch $@

# --no-compile: 12,000 files of Python would take a minute, and what is used of them is compiled when it is imported.
$(VENV)/.package: $(VENV)/.tools pyproject.toml setup.py CMakeLists.txt $(CPP)
	@echo 'installing layerpipe into $(VENV) (the first time with torch: minutes)'
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
	[ "$$free" -ge 9 ] || ls -d $(VENV)/lib/*/site-packages/torch >/dev/null 2>&1 || \
	    echo "only $$free GiB are free here: torch with its CUDA packages takes up to 9 while it is installed" >&2
	PYTHONWARNINGS='ignore:Editable installation' \
	$(PIP) install $(if $(wildcard $(VENV)/lib/*/site-packages/torch),-q) --no-compile --no-build-isolation -e '.[cli,test,dev]'
	@ls layerpipe_kernels/_C.*.so >/dev/null 2>&1 || \
	    echo 'the C++ kernels are left out: for them install g++ and python3-dev, then make clean'
	@touch $@
