# Two commands from a fresh clone: `make repro` and `make test`. The rest is named by `make help`.
PYTHON ?= python3
INSTALLED := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Byte code is compiled at first use, for the modules that are used: all of torch's would cost half a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help repro test lint bench

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

repro: $(INSTALLED)  ## run the pipeline: what changed, and nothing else
	dvc repro

test: $(INSTALLED)  ## run the tests
	pytest

lint: $(INSTALLED)  ## check style, format and types
	ruff check
	ruff format --check
	mypy

bench: $(INSTALLED)  ## measure speed against a textbook loop and TRL, a quarter of an hour
	pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	dvc repro split
	python -m benchmarks

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
