# make demo    everything that is needed, then the main job on phantom volumes on a CPU
# make test    the test suite without its slow part; make test-slow runs the slow part
# make mutants changes the code in PATHS, one small thing at a time, and prints what no test notices
# make tables  writes the tables of docs/commands.md anew from the commands' parsers
# make lint    ruff and mypy
# make docs    the documentation as a site in site/, without a warning; site/index.html opens in a browser
# make venv    only the environment; PYTHON=python3.12 chooses the Python, VENV=folder the place
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.nnssl-installed
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Test processes: one a core, at most four (each takes about 1 GB); 0 for none beside the first.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); if [ $$n -gt 4 ]; then n=4; elif [ $$n -lt 2 ]; then n=0; fi; echo $$n)
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
PATHS ?= nnssl/losses nnssl/heads nnssl/masking
MUTANT_ARGS ?=

.PHONY: demo test test-slow mutants tables lint docs format venv help
.DEFAULT_GOAL := help

help:
	@sed -n "/^#/!q; s/^# //p" Makefile

venv: $(STAMP)

# The editable install brings its own entry for nnU-Net's search for trainers, so nothing needs to be exported.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than 3.10. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo/run_demo.py $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow $(PYTEST_ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/tools/mutants.py $(PATHS) $(MUTANT_ARGS)

tables: $(STAMP)
	$(BIN)/python tests/tools/command_tables.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
