# make report | quick | test | test-gpu | test-night | test-cluster | gpu-session | bench | study | tables | check | docs | lock | clean: each makes .venv first when it is missing or out of date.

PYTHON ?= python3.11
VENV := .venv
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-dev
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Without compiled modules beside them every job compiles torch and transformers again: 3 seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help report quick test test-gpu test-night test-cluster gpu-session bench study tables check docs lock clean

help:
	@echo "make report    run the pipeline up to results/report.html"
	@echo "make quick     run the tests that are quick: no kills, no fuzzing, no browser, no engines, nothing compiled"
	@echo "make test      run the tests that need no GPU"
	@echo "make test-gpu  run the tests that need one"
	@echo "make test-night  run what each landing does not: 800 random checkpoints more, a server under way"
	@echo "make test-cluster  run the pipeline on a Slurm that is started for it; as root it installs Debian's"
	@echo "make gpu-session  test and measure on a GPU within ten minutes; DRY=1 on tiny shapes without one"
	@echo "make bench     time loading, decoding and each operation, on the artifacts of make report -> benchmarks/results/"
	@echo "make study NAME=quality   a pipeline of its own for a question, see studies/README.md"
	@echo "make tables    put the numbers of results/report.csv and a picture of the report into the documentation"
	@echo "make check     format, lint, types, workflow, documentation: what CI runs before the tests"
	@echo "make docs      build the documentation into build/site/index.html"
	@echo "make lock      write the versions in $(VENV) into requirements.lock and requirements-dev.lock"
	@echo "make clean     remove logs and caches, but neither data, nor results, nor $(VENV)"

report: $(INSTALLED)
	snakemake --cores all --quiet rules progress host reason -- results/report.html

# One thread per process: the two workers share the cores.
quick: $(TESTED)
	OMP_NUM_THREADS=1 pytest -n 2 -m "not gpu and not slow and not cluster and not night"

test: $(TESTED)
	OMP_NUM_THREADS=1 pytest -n 2 -m "not gpu and not cluster and not night"

test-gpu: $(TESTED)
	pytest -m gpu

# What takes longer than a landing may, or looks at how long things take.
test-night: $(TESTED)
	OMP_NUM_THREADS=1 pytest -n 2 -m "night and not gpu"

test-cluster: $(TESTED)
	@command -v slurmctld >/dev/null || { test "$$(id -u)" = 0 && apt-get update --quiet && \
	  apt-get install --yes --quiet --no-install-recommends slurm-wlm munge; } || \
	  { echo "error: slurmctld and munged are not installed: apt-get install slurm-wlm munge, as root" >&2; exit 1; }
	python -m pip install --quiet snakemake-executor-plugin-slurm==2.8.0
	pytest -m cluster tests/workflow/test_slurm.py

# What a GPU can tell within ten minutes; steps=loops for one of them.
gpu-session: $(TESTED)
	python benchmarks/gpu_session.py $(if $(DRY),--dry --out build/gpu-session) $(steps)

ARTIFACTS := compressed/rtn-3bit compressed/gptq-3bit compressed/svd-90 compressed/lillama-90 compressed/cluscomp-3bit
DELTAS := delta-come delta-svd delta-bitdelta delta-magnitude

# Nothing is timed before it is right.
bench: $(TESTED)
	pytest -q tests/nn/kernels
	python benchmarks/loading.py --base data/models/smollm2 \
	  $(addprefix data/,models/smollm2 $(ARTIFACTS) $(addprefix compressed/,$(DELTAS)))
	python benchmarks/low_rank_speed.py data/models/smollm2 data/compressed/lillama-90 data/compressed/svd-90
	python benchmarks/decode.py data/models/smollm2 $(addprefix data/,$(ARTIFACTS)) --delta data/compressed/delta-come
	python benchmarks/delta_serving.py data/models/smollm2 data/compressed/delta-come
	python benchmarks/delta_directions.py
	python benchmarks/kernels.py
	python benchmarks/kernel_resources.py

# A question that takes longer than the default pipeline: make study NAME=quality; see studies/README.md.
study: $(INSTALLED)
	cd studies/$(NAME) && snakemake --cores all --quiet rules progress host reason

tables: $(TESTED)
	python docs/tables.py --write
	python tests/report/headless_browser.py results/report.html docs/images/report.png

check: $(TESTED)
	ruff format --check .
	ruff check .
	mypy
	snakefmt --check Snakefile workflow/rules tests/workflow/toy/Snakefile
	snakemake --lint
	python workflow/code_deps.py --check
	python workflow/check_lock.py --strict
	python workflow/params_schema.py --check
	python docs/tables.py --check
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

docs: $(TESTED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "The documentation is in $(CURDIR)/build/site/index.html; with a search: mkdocs serve"

# The versions as they are installed; to change one, pip install it first.
lock: $(TESTED)
	python workflow/lock.py
	@touch $(INSTALLED) $(TESTED)

clean:
	rm -rf logs scratch build dist dvc_plots .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests workflow -name __pycache__ -type d -prune -exec rm -rf {} +

# Modules are compiled when they are first imported: most never are, and compiling all takes two minutes.
$(INSTALLED): requirements.lock pyproject.toml setup.py llmpress.pth src/llmpress/nn/kernels/cpu/products.cpp
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 13))' 2>/dev/null \
	  || { echo "make: $(PYTHON) is not a working Python 3.11.5 to 3.12; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip==26.3
	python -m pip install --no-compile -r requirements.lock
	python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

# What tests, checks and the documentation need beside it.
$(TESTED): requirements-dev.lock $(INSTALLED)
	python -m pip install --no-compile -r requirements-dev.lock
	@touch $@
