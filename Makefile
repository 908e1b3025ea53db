# make train    train a small model on this machine, from nothing
# make test     lint, type-check and test
# make lint     lint and type-check alone
# make gpu      the tests that need a CUDA device
# make faults   many kills, mutated configurations, damaged files and architectures (an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# The package alone, which is enough to train; and what the tests need on top of it.
PACKAGE := $(VENV)/.installed
TESTS := $(VENV)/.installed-dev

.PHONY: train test lint gpu faults clean

train: $(PACKAGE)
	$(BIN)/lowprec train llama-tiny-cpu

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

gpu: $(TESTS)
	$(BIN)/python -m pytest -m gpu tests/gpu

faults: $(TESTS)
	$(BIN)/python -m pytest -m faults tests/faults

# Installed once, and again only when what it is installed from has changed.
$(PACKAGE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(TESTS): $(PACKAGE)
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
