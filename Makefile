# Every target works in a fresh clone, without an earlier step.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test bench peers chaos setup lint packages clean

help:
	@echo "make demo    set up, then a tour: three nodes share processors, memory and files"
	@echo "make test    set up, then every check and test"
	@echo "make bench   set up, then the benchmarks against their peers"
	@echo "make peers   set up, then memcached's own test suites against a node"
	@echo "make chaos   set up, then the tests that kill and stop processes, for hours"
	@echo "make setup   a virtual environment in $(VENV) with VIRGO in it"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "VIRGO needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "VIRGO needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { echo "hint: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[arrays]' --group dev
	@touch $(STAMP)

demo: setup
	$(BIN)/virgo demo

# The tests drive real peers; a missing one is an error where CI=true, and installed where we are root.
packages:
	@sh scripts/packages.sh redis-server redis-tools memcached telnet gcc iproute2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup packages lint
	$(BIN)/python -m pytest

bench: setup
	@sh scripts/packages.sh redis-server redis-tools memcached
	sh benchmarks/run.sh

# Their sources are fetched: they are no part of this repository. scripts/peers/expected.toml says what may fail.
peers: setup
	@sh scripts/packages.sh dpkg-dev gcc libc6-dev perl
	$(BIN)/python scripts/peers/suites.py

# What `make test` does some tens of times, done thousands of times.
chaos: setup packages
	VIRGO_TEST_KILLS=2000 $(BIN)/python -m pytest --timeout 14400 -k kill tests/memory
	VIRGO_TEST_CHAOS_S=3600 $(BIN)/python -m pytest tests/cpu/test_cpu_chaos.py

clean:
	rm -rf $(VENV) .venv-bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
