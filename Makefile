# On a fresh machine, `make quickstart` and `make test` install what they need and run it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extras for users, and those that the tests need as well.
USER_EXTRAS := envs,agents,convert,s3fs
TEST_EXTRAS := $(USER_EXTRAS),serve,atari,ray,dev
# How many processes share the tests, file by file. Some tests start several ranks, so one process for each core is enough.
TEST_PROCESSES ?= 2
# A file of exact versions with the hashes of their files, which are verified. CI sets it; without it the ranges count.
LOCK ?=
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready

export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_CACHE_DIR ?= $(CURDIR)/$(VENV)/uv-cache
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test test-all check format bench benchmark-environment clean

setup: $(READY)

# DeepSpeed's CPU operators, which it would compile at the first step, are not used. So nothing of it is compiled, here or later.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tiphys needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt $(LOCK:%=-r %) -e '.[$(USER_EXTRAS)]'
	touch $@

$(TEST_READY): $(READY)
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt $(LOCK:%=-r %) -e '.[$(TEST_EXTRAS)]'
	touch $@

quickstart: setup
	$(BIN)/tiphys quickstart

test: $(TEST_READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-all: $(TEST_READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m ""

check: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

# Other data loaders, for comparison. They are never installed into the project's own environment.
benchmark-environment: setup
	test -x .venv-benchmarks/bin/python || $(BIN)/uv venv -q .venv-benchmarks
	$(BIN)/uv pip install -q --python .venv-benchmarks/bin/python -r benchmarks/others/requirements.txt

clean:
	rm -rf $(VENV) .venv-benchmarks build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
