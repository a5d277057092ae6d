PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: train test test-full lint venv clean

train: venv            ## train on the embedded data set; ends with F1 and where the model lies
	$(BIN)/crossrank train --recipe demo

test: lint             ## the test suite
	HF_HUB_OFFLINE=1 $(RUN) pytest -m "not full"

test-full: lint        ## and the slow tests: half an hour or more
	HF_HUB_OFFLINE=1 $(RUN) pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/ready      ## .venv with what constraints.txt pins

.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "crossrank needs Python 3.10 or later; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
