PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: train unit test test-full lint venv clean

train: .venv/run       ## train on the embedded data set; ends with F1 and where the model lies
	$(BIN)/crossrank train --recipe demo

unit: .venv/test       ## the tests that start no second process: a minute or two
	HF_HUB_OFFLINE=1 $(RUN) pytest -m "not full" --unit -n 2 --dist loadfile

test: lint             ## the test suite
	HF_HUB_OFFLINE=1 $(RUN) pytest -m "not full" -n 2 --dist loadfile

test-full: lint        ## and the slow tests: half an hour or more
	HF_HUB_OFFLINE=1 $(RUN) pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/test       ## .venv with what constraints.txt pins, for training and tests

# What a target does not need, it does not install: DeepSpeed, sentence-transformers and W&B are for the tests. Triton
# lies by itself, where only the tests of the kernels look: torch's build for CPUs comes without it.
.venv/run: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "crossrank needs Python 3.10 or later; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	test "$$(uname)" != Linux || $(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/triton triton
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
