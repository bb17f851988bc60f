# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a user needs, and what the tests need beside it.
USER_EXTRAS := envs,agents,convert,s3fs
TEST_EXTRAS := $(USER_EXTRAS),atari,ray,dev
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready

export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_CACHE_DIR ?= $(CURDIR)/$(VENV)/uv-cache
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test test-all check format bench benchmark-environment clean

setup: $(READY)

# Nothing is compiled here or later: DeepSpeed's CPU operators, which it would build at the first step, are not used.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tiphys needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[$(USER_EXTRAS)]'
	touch $@

$(TEST_READY): $(READY)
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[$(TEST_EXTRAS)]'
	touch $@

quickstart: setup
	$(BIN)/tiphys quickstart

test: $(TEST_READY)
	$(BIN)/python -m pytest

test-all: $(TEST_READY)
	$(BIN)/python -m pytest -m ""

check: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

# Other data loaders, to measure against: never part of the project's own environment.
benchmark-environment: setup
	test -x .venv-benchmarks/bin/python || $(BIN)/uv venv -q .venv-benchmarks
	$(BIN)/uv pip install -q --python .venv-benchmarks/bin/python -r benchmarks/others/requirements.txt

clean:
	rm -rf $(VENV) .venv-benchmarks build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
