# Everything here needs `python3` (3.11 or newer) and `make`; the environment in .venv is made when it is missing
# or when pyproject.toml or constraints.txt changed. Tests that want the larger data sets find them through the
# environment variable DEITKIT_SHARED_DATA and are skipped without it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-this-checkout

# A process of tests for every core, eight at most.
IN_PARALLEL := -n logical --maxprocesses 8 --dist worksteal

# What `make golden` compares the working tree with.
BASE ?= HEAD

.PHONY: help demo test test-all check format docs results-quick golden torture environment clean

help:
	@echo 'make demo      train a small transformer on the digits, with and without a teacher'
	@echo 'make test      run the tests (make test-all: the slow ones too)'
	@echo 'make check     formatting, lint, types, import rules'
	@echo 'make format    format the code and mend what can be mended'
	@echo 'make docs      build the documentation as a site in site/'
	@echo 'make results-quick'
	@echo '               make a small table of docs/evidence/losses.md again, and compare'
	@echo 'make golden BASE=REV'
	@echo '               show that the working tree computes what the commit REV does, bit for bit'
	@echo 'make torture   kill trainings, feed them damaged images, fill their disks: what is lost?'
	@echo 'make clean     remove the environment and what tools left behind'

demo: $(STAMP)
	$(BIN)/deit demo

test: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m ''

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'site/index.html'

results-quick: $(STAMP)
	rm -rf runs/results-quick
	$(BIN)/python benchmarks/results_quick.py --out runs/results-quick

golden: $(STAMP)
	$(BIN)/python benchmarks/golden.py --base $(BASE)

torture: $(STAMP)
	$(BIN)/python benchmarks/torture.py

environment: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'make: Python 3.11 or newer is needed, $(PYTHON) is not: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
