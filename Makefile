# make train    train a small model on this machine, from nothing
# make test     lint, type-check and test
# make lint     the first two alone
# make gpu      the tests that need a CUDA device

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test lint gpu clean

train: $(INSTALLED)
	$(BIN)/lowprec train configs/llama-tiny-cpu.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu tests/gpu

# Installed once, and again only when what it is installed from has changed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
