# Two commands from a fresh clone: `make repro` and `make test`. The rest is named by `make help`.
PYTHON ?= python3
INSTALLED := .venv/installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Byte code is compiled at first use, for the modules that are used: all of torch's would cost half a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help repro review chat export test lint check-lock audit chaos clean bench scaling
# What `make review` compares: BASE with REV, each a branch, a commit, an experiment or the workspace.
BASE ?= main
REV ?= workspace
export BASE REV  # the shell takes them from there: a name is no shell text

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

repro: $(INSTALLED)  ## run the pipeline: what changed, and nothing else
	dvc repro
	@echo "Disk (results of all runs, checkpoints); how to get it back is in the README:"
	@du -sh .dvc/cache .scratch 2>/dev/null || true  # one of them may not be there

review: $(INSTALLED)  ## compare with BASE=main: what changed, is the difference real, do the gates hold
	python -m review "$$BASE" "$$REV"

chat: $(INSTALLED)  ## talk to the tuned model, and to the base model to compare
	python -m stages.chat

export: $(INSTALLED)  ## write the tuned model as GGUF for llama.cpp, Ollama and LM Studio, and ask it
	python -m stages.export

test: $(INSTALLED)  ## run the tests
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)  ## check style, format and types
	ruff check
	ruff format --check
	mypy

check-lock: $(INSTALLED)  ## check that dvc.lock describes the code, the parameters, the data and the metrics
	python .ci/check_lock.py

audit: $(INSTALLED)  ## look for known vulnerabilities and for secrets
	python .ci/audit.py

chaos: $(INSTALLED)  ## kill the pipeline at 100 random moments and see that nothing is lost, ten minutes
	python -m tests.chaos

clean: $(INSTALLED)  ## delete checkpoints and what killed runs have left; results stay
	python -m stages.clean

bench: $(INSTALLED)  ## measure speed against a textbook loop and TRL, a quarter of an hour
	pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	dvc repro split
	python -m benchmarks

scaling: $(INSTALLED)  ## measure the data stages up to a million rows, twenty minutes
	dvc repro split
	python -m benchmarks.scaling

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	python -m review.plots
	dvc config --local plots.html_template ../.venv/plots.html
	touch $@
